# SPDX-License-Identifier: Apache-2.0
"""One row of the table of laws: a method, with some settings, on one kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import PeftConfig
from ..core.around import Block
from ..core.method import Replace
from ..core.prompt import Prompt
from ..registry import Entry
from .benches import Bench


@dataclass(frozen=True)
class Case:
    """One method, with some settings, on one kind of layer.

    setting: what these settings are called. values: the config's fields. other: what differs in a second adapter.
    call: what a call needs beside its inputs. first: these are the method's own plain settings.
    neutral, mergeable: where False, these settings on this layer change the model from the start, or have no merged form,
        although the method's default does not, or has one.
    rebased: they start by moving a part of the base weight into the adapter. idle: parts of the names of tensors that the
        format has and nothing teaches.
    """

    entry: Entry = field(repr=False)
    setting: str
    bench: Bench = field(repr=False)
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    other: Mapping[str, Any] = field(default_factory=dict, repr=False)
    call: Mapping[str, Any] = field(default_factory=dict, repr=False)
    first: bool = True
    neutral: bool = True
    mergeable: bool = True
    rebased: bool = False
    idle: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """The names of the method and of its settings."""
        return self.entry.name, self.setting

    @property
    def replaces(self) -> bool:
        """The method swaps whole modules, and has no weight function."""
        return issubclass(self.entry.method, Replace)

    @property
    def whole(self) -> bool:
        """The method acts on a whole model: beside its layers, or on its blocks."""
        return issubclass(self.entry.method, (Prompt, Block))

    @property
    def merges(self) -> bool:
        """A merged form exists."""
        return self.entry.method.unmergeable is None and self.mergeable

    @property
    def starts(self) -> bool:
        """A new adapter changes nothing."""
        return self.entry.method.exact_start and self.neutral

    def config(self, **changes: Any) -> PeftConfig:
        """A new config. Where the format has no field for bare parameters, they are named on the object."""
        known = {f.name for f in fields(self.entry.config)}
        targets = {"target_modules": ["l"]} if self.replaces else self.bench.targets
        targets = {**targets, "num_virtual_tokens": 3} if "num_virtual_tokens" in known else targets
        values = {**targets, **self.values, **changes}
        config = self.entry.config(**{k: v for k, v in values.items() if k in known})
        for name in values.keys() - known:
            setattr(config, name, values[name])
        return config

    def __str__(self) -> str:
        return f"{self.entry.name.lower()}-{self.setting}-{self.bench.name}"
