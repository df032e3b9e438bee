# SPDX-License-Identifier: Apache-2.0
"""Heuristics: when something bites, why, what to do, and what that was measured to be worth."""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..facts import Facts
from ..page import Page

Predicate = Callable[[Facts], bool]
Step = str | Mapping[str, Any]

OWN = "heuristics.json"
"""The results of `benchmarks/heuristics.py`: one entry a function, called as the heuristic is."""
MEASURED = Path(__file__).parents[1] / "measured.json"
"""The effects in words, by heuristic: made from the results, and part of the package, which the results are not."""


@dataclass(frozen=True)
class Effect:
    """A sentence with figures in it. figures: by name, where each stands: a file of results, and the way into it. A step
    is a key, or of a list the entry that has these values.
    """

    text: str
    figures: Mapping[str, tuple[str, tuple[Step, ...]]]

    def told(self, results: Path) -> str:
        """The sentence. Raises `ConfigError` where the results have no such figure."""
        found = {name: _figure(results, file, steps) for name, (file, steps) in self.figures.items()}
        ratios = {f"{a}_to_{b}": found[a] / found[b] for a, b in _ratios(self.text, found)}
        return self.text.format(**found, **ratios).replace("0e+00", "0")

    @property
    def sources(self) -> str:
        """The files that the figures are from."""
        return ", ".join(dict.fromkeys(f"`benchmarks/results/{file}`" for file, _ in self.figures.values()))


def _ratios(text: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(a, b) for a in found for b in found if f"{a}_to_{b}" in text]


def _figure(results: Path, file: str, steps: tuple[Step, ...]) -> Any:
    value: Any = _read(results / file)
    for step in steps:
        try:
            value = value[step] if isinstance(step, str) else next(v for v in value if step.items() <= v.items())
        except (KeyError, TypeError, StopIteration) as error:
            raise ConfigError(f"{file} has no {step!r} on the way {steps}.") from error
    return value


@functools.cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def cited(text: str, file: str, **figures: tuple[Step, ...]) -> Effect:
    """An effect whose figures were measured for something else."""
    return Effect(text, {name: (file, steps) for name, steps in figures.items()})


@dataclass(frozen=True, kw_only=True)
class Heuristic(Page):
    """when: in words, what `applies` decides. do: what to do. effects: what was measured. told: `graftlet train` says so."""

    kind = "heuristic"
    when: str
    do: str
    applies: Predicate
    effects: tuple[Effect, ...]
    told: bool = True

    def sections(self) -> dict[str, str]:
        measured = "\n".join(f"- {line}" for line in measured_effects().get(self.name, ()))
        return {"When": self.when, "What to do": self.do, "Measured": measured}


@functools.cache
def measured_effects() -> dict[str, list[str]]:
    """The effects in words, by the heuristic's name."""
    return json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}


def told_effects(heuristic: Heuristic, results: Path) -> list[str]:
    """A heuristic's effects in words, from the results themselves."""
    return [f"{effect.told(results)} ({_where(effect, results)})" for effect in heuristic.effects]


def _where(effect: Effect, results: Path) -> str:
    devices = {str(_read(results / file).get("device")) for file, _ in effect.figures.values()}
    return f"{', '.join(sorted(devices))}; {effect.sources}"


def heuristic(
    title: str,
    *,
    when: str,
    do: str,
    effect: str | None = None,
    also: tuple[Effect, ...] = (),
    links: tuple[str, ...] = (),
    evidence: tuple[str, ...] = (),
    told: bool = True,
) -> Callable[[Predicate], Heuristic]:
    """A page of the predicate below: called as the function is, its docstring says why.

    effect: a sentence on the figures that `benchmarks/heuristics.py` measured under the same name; also: others.
    """

    def made(applies: Predicate) -> Heuristic:
        name = applies.__name__.replace("_", "-")
        own = () if effect is None else (Effect(effect, _own(name, effect)),)
        text = " ".join((applies.__doc__ or "").split())
        return Heuristic(
            name=name, title=title, text=text, when=when, do=do, applies=applies,
            effects=(*own, *also), links=links, evidence=evidence, told=told,
        )  # fmt: skip

    return made


def _own(name: str, text: str) -> dict[str, tuple[str, tuple[Step, ...]]]:
    fields = [field.split("_to_") for _, field, _, _ in string.Formatter().parse(text) if field]
    return {part: (OWN, ("effects", name, part)) for parts in fields for part in parts}


def collected(module: Mapping[str, Any]) -> tuple[Heuristic, ...]:
    """The heuristics that a module defines."""
    return tuple(value for value in module.values() if isinstance(value, Heuristic))
