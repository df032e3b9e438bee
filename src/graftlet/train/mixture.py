# SPDX-License-Identifier: Apache-2.0
"""A recipe of a combination: which adapters, in what shares and how, in one TOML file, checked as recipes of training are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..core.combine import KINDS
from ..errors import nearest
from .recipe import Count, File, Table, load_file

Share = Annotated[float, Field(gt=0, le=1)]


class Part(Table):
    """One `[[adapters]]`: an adapter, and its share."""

    source: str
    """A folder or a hub id; all of one base."""
    weight: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """May be negative. All of them have one, or none has: they count alike then."""


class Trial(Table):
    """`[evaluation]`: the held-out examples that combinations are measured on."""

    recipe: str
    """A recipe of training, whose examples for validation (or test, where there are none) these are."""
    search: bool = False
    """Find the weights with the least loss. `--search` turns it on."""


class Mixture(File):
    """A combination of adapters. Made by `load_mixture`."""

    output: str
    """The folder for the combined adapter."""
    title: str = ""
    adapters: Annotated[list[Part], Field(min_length=1)]
    kind: str = "exact"
    rank: Count | None = None
    """Of the result; of what `kind` says by default."""
    energy: Share | None = None
    """Or the share of the squared singular values that is kept."""
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of the entries that kinds that prune keep."""
    sign: Literal["total", "frequency"] = "total"
    """How the `ties` kinds elect a sign."""
    base: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    evaluation: Trial | None = None

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"there is no such kind{nearest(kind, KINDS) or '.'} Allowed: {', '.join(KINDS)}")
        return kind

    @model_validator(mode="after")
    def _goes_together(self) -> Mixture:
        if self.kind not in KINDS:
            raise ValueError(
                f"kind = {self.kind!r}: no such kind{nearest(self.kind, KINDS)} Allowed: {', '.join(KINDS)}"
            )
        if self.rank is not None and self.energy is not None:
            raise ValueError("rank and energy: give one of them, or none")
        given = [part.weight is not None for part in self.adapters]
        if any(given) and not all(given):
            raise ValueError("adapters: a weight for each of them, or for none")
        if any(given) and self.evaluation is not None and self.evaluation.search:
            raise ValueError("evaluation.search finds the weights: leave them out, or search = false")
        return self

    @property
    def weights(self) -> list[float] | None:
        """One an adapter; None where they are left open."""
        found = [part.weight for part in self.adapters if part.weight is not None]
        return found or None

    def beside(self, path: str) -> str:
        """A path as given, or in the folder of the recipe's file where it is there and not here."""
        return str(self.folder / path) if not Path(path).exists() and (self.folder / path).exists() else path


def load_mixture(file: str | Path, overrides: Iterable[str] = ()) -> Mixture:
    """The combination of a TOML file, with `key=value` overrides: `kind=svd`, `rank=8`.

    Raises:
        ConfigError: the file is missing or no TOML, or a key or a value is wrong; with file, line and the right key.
    """
    return load_file(Mixture, file, overrides)
