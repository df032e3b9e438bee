# SPDX-License-Identifier: Apache-2.0
"""The command `graftlet`. Each command imports what it needs when it is run, so that `graftlet --help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import CallError, GraftletError, GraftletWarning, TrainingInterrupted

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder with an adapter, or its id on the hub.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter's config says.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: as it was trained.")]
ENGINES = ("vllm", "gguf-lora", "diffusers", "mlx", "merged")
"""What there is to export to: here too, so that help and completion load nothing. So are the tasks."""
TASKS = ("sft", "dpo", "reward", "embedding", "classification")
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


def main() -> None:
    """The console script: one clean line for an error that was raised on purpose, a traceback with `--debug`."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        app()
    except (GraftletError, GraftletWarning) as error:  # a warning where GRAFTLET_STRICT is set
        if debug:
            raise
        _complain(str(error))
        sys.exit(130 if isinstance(error, TrainingInterrupted) else 1)


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one talks
        Console(stderr=True, highlight=False).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def _quiet() -> None:
    """Keep transformers' own notices and bars off the screen: what matters is said by the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graftlet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a small adapter on a frozen large model, then use, merge and look into it."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Keys to change.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it takes.")] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Keys of the recipe can be changed: training.learning_rate=1e-4 output=runs/a. Ctrl-C saves a checkpoint;
    resume=true goes on from the last one.
    """
    if dry_run:
        plan(recipe, overrides)
        return
    from ..train.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])
    _quiet()
    from ..train.run import train as carry_out
    from . import _knowledge

    _knowledge.tell(checked)
    carry_out(checked)


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask; several are asked in turn.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file of prompts, one a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Ask the base alone, to compare.")] = False,
    system: Annotated[str | None, typer.Option(help="A system prompt, in place of the recipe's.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it stands, without the recipe's wording.")] = False,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = "auto",
) -> None:
    """Ask a model with its adapter, and show the answer while it is written."""
    _quiet()
    from . import _generate

    prompts = _generate.read_prompts(prompt or [], file)
    settings = _generate.Settings(max_new_tokens, temperature, seed, not no_adapter, system, raw)
    _generate.generate(adapter, prompts, settings, base=base, dtype=dtype, device=device)


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the merged model.")],
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merged model that is there.")] = False,
) -> None:
    """Write the base with the adapter merged into its weights, and the tokenizer: a model that needs no Graftlet."""
    _quiet()
    from . import _merge

    _merge.merge(adapter, out, base=base, dtype=dtype, device=device, overwrite=overwrite)


@app.command()
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Folders or hub ids, of one base; or a TOML file, and key=value."),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder for the combined adapter.")] = None,
    weights: Annotated[str | None, typer.Option(help="0.7,0.3: one an adapter. Default: all the same.")] = None,
    kind: Annotated[str, typer.Option(help="exact, svd, cat, linear, ties, ties_svd, dare_linear, ...")] = "exact",
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of the result.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or the share of the squared singular values to keep.")] = None,
    density: Annotated[float | None, typer.Option(help="The share of entries that pruning kinds keep.")] = None,
    sign: Annotated[str, typer.Option(help="How ties elects a sign: total or frequency.")] = "total",
    recipe: Annotated[Path | None, typer.Option(help="A recipe, whose held-out examples a search is on.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the weights with the least held-out loss.")] = False,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Make one adapter of several: their weighted sum.

    `graftlet combine combination.toml` does what a recipe of a combination says; --search finds the weights.
    """
    _quiet()
    from . import _combine

    if adapters[0].endswith(".toml"):
        if kind != "exact" or sign != "total" or any(v is not None for v in (weights, rank, energy, density, dtype)):
            raise CallError(f"{adapters[0]} says how: change it there, or by key=value after it, such as kind=svd.")
        _combine.by_recipe(adapters[0], adapters[1:], out, recipe, search, base, device)
        return
    if out is None:
        raise CallError("--out is missing: the folder for the combined adapter.")
    how = _combine.How(kind, rank, energy, density, sign)
    where = {"base": base, "dtype": dtype, "device": device}
    given = None if weights is None else _combine.numbers(weights)
    _combine.combine(adapters, out, how, weights=given, recipe=recipe, search=search, where=where)


@app.command()
def inspect(
    adapter: Adapter,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    diff: Annotated[str | None, typer.Option(metavar="OTHER", help="Compare with another adapter.")] = None,
) -> None:
    """Say what an adapter is: method, targets, size, and how large and how varied each layer's change is.

    `graftlet inspect --diff A B` says where two adapters differ: settings, and how far apart and how alike their
    changes are, layer by layer.
    """
    from . import _inspect

    if diff is not None:
        _inspect.compare(diff, adapter, json)
    else:
        _inspect.inspect(adapter, json, html)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with an adapter.")],
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what a folder contains and whether it would load. Nothing in it is run or loaded, and torch is not needed."""
    from . import _verify

    _verify.show(folder, json)


@app.command()
def convert(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the LoRA adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of each layer's change to keep, 0.95 say.")
    ] = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
) -> None:
    """Write an adapter of any method as a LoRA adapter, and say how much of each layer's change is lost."""
    _quiet()
    from . import _convert

    _convert.convert(adapter, out, rank=rank, energy=energy, base=base, dtype=dtype, device=device, overwrite=overwrite)


@app.command()
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[str, typer.Option(help=", ".join(ENGINES), autocompletion=lambda: ENGINES)],
    rank: Annotated[int | None, typer.Option(min=1, help="Convert to LoRA of this rank.")] = None,
    energy: Annotated[float | None, typer.Option(min=0, max=1, help="Or to this share of each layer's change.")] = None,
    component: Annotated[str | None, typer.Option(help="diffusers: unet, transformer, text_encoder, ...")] = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
) -> None:
    """Write an adapter as another engine loads it. Methods other than LoRA are converted, and what is lost is told."""
    _quiet()
    from . import _export

    where = {"base": base, "dtype": dtype, "device": device}
    _export.carry_out(adapter, out, to, rank=rank, energy=energy, component=component, where=where, overwrite=overwrite)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The file to write.")] = Path("recipe.toml"),
    task: Annotated[
        str | None, typer.Option(help="What is learnt: " + ", ".join(TASKS) + ".", autocompletion=lambda: TASKS)
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder, a hub id, or package:DIST.")] = None,
    data: Annotated[str | None, typer.Option(help="A file, or a dataset id of the hub.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked: a template, {question}.")] = None,
    completion: Annotated[str | None, typer.Option(help="The right answer: a template.")] = None,
    rejected: Annotated[str | None, typer.Option(help="A worse answer: a template.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of the label.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, or any other that `graftlet methods` lists.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank, where the method has one.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The largest learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How many times over the data.")] = None,
    output: Annotated[str | None, typer.Option(help="The folder that becomes the adapter.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the defaults.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is there.")] = False,
) -> None:
    """Ask a few questions, and write a recipe with a word on each key. What the options answer is not asked."""
    from . import _init

    answers = _init.Answers(
        task, model, data, prompt, completion, rejected, label, method, rank, learning_rate, epochs, output
    )
    _init.init(file, answers, ask=not yes, overwrite=overwrite)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders that `graftlet train` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with the curves over one another.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Put runs side by side: what was measured, and where their recipes differ."""
    from . import _compare

    _compare.compare(runs, html, json)


@app.command()
def methods(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods."""
    from . import _methods

    _methods.methods(json)


# what it takes, and what there is to know


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Keys to change.")] = None,
    device: Annotated[str | None, typer.Option(help="Another device than the recipe's: H100, RTX 4090, cpu.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what a recipe's training takes: memory by part, time, what would make it fit. Nothing is loaded."""
    from . import _plan

    _quiet()
    _plan.plan(recipe, overrides or [], device, json)


@app.command()
def survey(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Python repository. Nothing in it is run.")],
    out: Annotated[
        Path | None, typer.Option(help="A folder for the pages; without it, only the index is shown.")
    ] = None,
    format: Annotated[str, typer.Option(help="markdown or mediawiki.")] = "markdown",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pages that were edited.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Find what a repository needs and what its lore is, with file and line, as pages for a person to edit."""
    from . import _survey

    _survey.survey(path, out, format, overwrite, json)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE.toml", help="Also say what a run should know.")
    ] = None,
    feature: Annotated[
        str | None, typer.Option(help="A feature, an environment or a public name, such as BitsAndBytesConfig.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what works on this machine, what does not, why, and what mends it.

    The exit status is 1 where the feature asked for does not work, or, without --feature, where something installed is broken.
    """
    from . import _knowledge

    _knowledge.doctor(recipe, feature, json)


@app.command()
def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="Of an error, warning, heuristic or environment.")
    ] = None,
) -> None:
    """Show the page of a code; without one, list them all."""
    from . import _knowledge

    _knowledge.explain(code)
