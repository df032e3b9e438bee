# SPDX-License-Identifier: Apache-2.0
"""`graftlet combine`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core.combine import Fit
from ..errors import CallError, GraftletWarning
from ..train.adapter import Opened, open_adapter
from ..train.mixture import load_mixture
from ..train.recipe import load_recipe
from ..train.sources import whole_or_not_at_all
from ..train.weights import HeldOut, Search

RESULT = "default"
"""The adapter that is saved into the folder itself."""


@dataclass(frozen=True)
class How:
    """The options of a combination."""

    kind: str
    rank: int | None
    energy: float | None
    density: float | None
    sign: str

    def put(self, model: Any, names: list[str], weights: list[float]) -> dict[str, Fit]:
        """Put the combination into the model as `RESULT`, in place of what is there by that name."""
        if RESULT in model.peft_config:
            model.delete_adapter(RESULT)
        return model.add_weighted_adapter(
            names,
            weights,
            RESULT,
            self.kind,
            svd_rank=self.rank,
            energy=self.energy,
            density=self.density,
            majority_sign_method=self.sign,
        )


def combine(
    adapters: list[str],
    out: Path,
    how: How,
    *,
    weights: list[float] | None,
    recipe: Path | None,
    search: bool,
    where: dict[str, Any],
) -> None:
    """Write the weighted combination of adapters of one base into `out`.

    weights: one an adapter; None: all the same, or to be searched for. recipe: whose held-out examples a search is on.

    Raises:
        CallError: `out` is taken, or the options do not go together.
        ConfigError: the adapters do not go together.
    """
    given = _check(adapters, out, weights, recipe, search)
    console = Console(highlight=False)
    opened = open_adapter(adapters[0], report=console.print, **where)
    names = _loaded(opened, adapters)
    if search and recipe is not None:
        given = _searched(opened, names, how, recipe, console)
    fits = how.put(opened.model, names, given)
    whole_or_not_at_all(out, lambda folder: _save(opened, folder))
    told = " + ".join(f"{w:g} × {a}" for w, a in zip(given, adapters, strict=True))
    console.print(f"{told} ({how.kind})", soft_wrap=True)
    if fits:
        ranks, worst = [f.rank for f in fits.values()], max(fits.items(), key=lambda item: item[1].error)
        console.print(f"{len(fits)} layers, ranks {min(ranks)} to {max(ranks)}", soft_wrap=True)
        console.print(f"largest distance from the sum: {worst[1].error:.2%} of it, in {worst[0]}", soft_wrap=True)
    console.print(f"{out}/", soft_wrap=True)


def by_recipe(
    file: str,
    overrides: list[str],
    out: Path | None,
    recipe: Path | None,
    search: bool,
    base: str | None,
    device: str,
) -> None:
    """The combination that a TOML file asks for, with options in place of what it says. Raises `ConfigError` too."""
    asked = load_mixture(file, overrides)
    trial = asked.evaluation
    examples = recipe or (Path(asked.beside(trial.recipe)) if trial is not None else None)
    combine(
        [asked.beside(part.source) for part in asked.adapters],
        Path(asked.output) if out is None else out,
        How(asked.kind, asked.rank, asked.energy, asked.density, asked.sign),
        weights=None if search else asked.weights,
        recipe=examples,
        search=search or (trial is not None and trial.search),
        where={"base": base or asked.base, "dtype": asked.dtype, "device": asked.device if device == "cpu" else device},
    )


def numbers(text: str) -> list[float]:
    """The numbers of an option."""
    try:
        return [float(w) for w in text.split(",")]
    except ValueError:
        raise CallError(f"--weights {text!r}: numbers with commas between them are needed, as 0.7,0.3.") from None


def _check(
    adapters: list[str], out: Path, weights: list[float] | None, recipe: Path | None, search: bool
) -> list[float]:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise CallError(f"{out} exists and is not empty; choose another folder.")
    if search and (recipe is None or weights is not None):
        raise CallError(
            "--search finds the weights on a recipe's held-out examples: give --recipe (or, in a recipe of a "
            "combination, [evaluation] recipe), and no --weights."
        )
    if weights is None:
        return [1 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters):
        raise CallError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters.")
    return weights


def _loaded(opened: Opened, adapters: list[str]) -> list[str]:
    """All adapters in the model, under names of their own."""
    model, names = opened.model, [f"adapter-{i}" for i in range(len(adapters))]
    model.rename_adapter(RESULT, names[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftletWarning)
        for name, source in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(source, name)
    return names


def _searched(opened: Opened, names: list[str], how: How, recipe: Path, console: Console) -> list[float]:
    held_out = HeldOut.of(load_recipe(recipe), opened.encoder)

    def measure(weights: list[float]) -> float:
        how.put(opened.model, names, weights)
        with opened.model.using(RESULT):
            loss = held_out.loss(opened.model)
        console.print(f"weights {', '.join(f'{w:g}' for w in weights)}: held-out loss {loss:.4f}", soft_wrap=True)
        return loss

    return Search(measure).run(len(names))


def _save(opened: Opened, folder: Path) -> None:
    opened.model.save_pretrained(folder, selected_adapters=[RESULT])
    opened.encoder.tokenizer.save_pretrained(folder)
