# SPDX-License-Identifier: Apache-2.0
"""Which heuristics apply to a run, and what is said of each before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .book import of_kind
from .facts import Facts, of_recipe
from .heuristics import Heuristic

if TYPE_CHECKING:
    from ..train.recipe import Recipe


@dataclass(frozen=True)
class Advice:
    """A heuristic that applies. As text, one line."""

    heuristic: Heuristic

    def __str__(self) -> str:
        do = self.heuristic.do.replace("`", "").split(". ")[0].rstrip(".")
        return f"{self.heuristic.title}: {do}. [{self.heuristic.name}]"

    def as_dict(self) -> dict[str, Any]:
        """It as plain values."""
        return {
            "code": self.heuristic.name,
            "title": self.heuristic.title,
            "when": self.heuristic.when,
            "do": self.heuristic.do,
        }


def applying(facts: Facts, quiet: bool = True) -> tuple[Advice, ...]:
    """What applies; with `quiet`, without what is worth knowing and nothing to act on before a run."""
    found = [page for page in of_kind("heuristic") if isinstance(page, Heuristic)]
    return tuple(Advice(h) for h in found if h.applies(facts) and (h.told or not quiet))


def advise(recipe: Recipe) -> tuple[Advice, ...]:
    """What a recipe's run should know."""
    return applying(of_recipe(recipe))
