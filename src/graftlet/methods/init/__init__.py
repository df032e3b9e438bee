# SPDX-License-Identifier: Apache-2.0
"""How a low-rank pair starts: one file a start, found by the name that `init_lora_weights` gives.

A start is a function of a layer's view and its factors A and B: it fills them, and may return a new base weight.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import ConfigError, nearest
from ...weights.site import Embedding, Site
from ..data.stream import kept
from ..data.turns import Shown

Fill = Callable[..., "Tensor | None"]
"""(view, A, B) -> a new base weight `[out, in]`, or None where the base stays."""


@dataclass(frozen=True)
class Start:
    """One way to start.

    name: what `init_lora_weights` says. fill: what it does. sites: the layers it works on; all where empty.
    rebases: moves a part of the base weight into the adapter, so a load must do it again on an untouched base.
    frozen: the factors that never learn, of "A" and "B". bounded: the rank cannot exceed the weight's sides.
    needs: what has to be run on the model first, so that the layers carry what was found in data.
    checks: raises `ConfigError` where a config's values do not go with it.
    before, after: what a start from data does on the base model, before there is an adapter: (model, config, batches,
        shown); and on the model with a new one: (model, adapter's name, batches, shown). Batches are arguments of a call
        that gives a loss; `Shown` says how far it is.
    """

    name: str
    fill: Fill
    sites: tuple[type[Site], ...] = ()
    rebases: bool = False
    frozen: str = ""
    bounded: bool = False
    needs: str | None = None
    checks: Callable[[Any, dict[str, int]], None] | None = None
    before: Callable[[Any, Any, Any, Shown], None] | None = None
    after: Callable[[Any, str, Any, Shown], None] | None = None

    def on(self, site: Site, key: str, rank: int) -> Start:
        """This start on a layer. Raises `ConfigError` where it means nothing there."""
        if self.sites and not isinstance(site, self.sites):
            if isinstance(site, Embedding):
                return initialiser(True)  # as other readers of the format do: a look-up starts in the ordinary way
            kinds = ", ".join(s.__name__ for s in self.sites)
            raise ConfigError(f"init_lora_weights={self.name!r} works on {kinds}, not on {key!r}; exclude that layer.")
        if self.bounded and rank > min(site.shape):
            raise ConfigError(
                f"init_lora_weights={self.name!r} needs r <= {min(site.shape)} on {key!r}, a weight of "
                f"{tuple(site.shape)}; r={rank} was given. Lower it there by rank_pattern."
            )
        if self.needs and kept(site, self.name) is None:
            raise ConfigError(
                f"init_lora_weights={self.name!r} starts from data, and {key!r} has none yet: run {self.needs}, first. "
                "To load an adapter that was made so, save it with path_initial_model_for_weight_conversion."
            )
        return self


_table: dict[str, Start] = {}


def start(name: str, **facts: Any) -> Callable[[Fill], Fill]:
    """Register the decorated function as the start `name`, with the facts that `Start` lists.

    `<k>` in a name stands for a number, which the function is given as `k`.
    """

    def register(fill: Fill) -> Fill:
        _table[name] = Start(name, fill, **facts)
        return fill

    return register


@functools.cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def initialiser(choice: bool | str) -> Start:
    """The start that `init_lora_weights` names. Raises `ConfigError` for what is none."""
    _load()
    name = choice.lower() if isinstance(choice, str) else repr(choice)
    if name in _table:
        return _table[name]
    for pattern, entry in _table.items():
        if found := re.fullmatch(pattern.replace("<k>", r"(?P<k>\d+)"), name):
            return replace(entry, name=name, fill=partial(entry.fill, k=int(found["k"])))
    words = [n for n in _table if n not in ("True", "False")]
    raise ConfigError(
        f"init_lora_weights={choice!r}{nearest(name, words)} Allowed: True, False, {', '.join(map(repr, words))}."
    )
