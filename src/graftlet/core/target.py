# SPDX-License-Identifier: Apache-2.0
"""Which layers a config means.

A list or set of names matches a path that is the name or ends in `.name`; a string is a regex over the whole path.
Paths are the model's own: wrappers that stand in for layers do not show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from .. import limits
from ..config import Names, PeftConfig, TaskType
from ..errors import ConfigError, NoMatchingPeftModuleError, PatternWarning, listing, nearest, warn
from ..errors import shown as cut
from ..patterns import check, endings, fullmatch
from ..registry import Entry
from ..weights.site import Conv1D, Linear, site_of
from ..weights.whole import shape_of
from .host import bare, below

ALL_LINEAR = "all-linear"
LONG = 20
"""How many paths it takes until `all-linear` is written out as endings of them."""
HEADS = ("classifier", "score")
"""What the head of a classification model is called; `all-linear` leaves it alone, training copies it whole."""
HEADS_OF = {"SEQ_CLS": HEADS, "TOKEN_CLS": HEADS, "QUESTION_ANS": ("qa_outputs",)}
"""The heads that a task trains along with an adapter, by all names that they go by."""


class Place(NamedTuple):
    """A module at its path, and where to put what shall stand in for it."""

    path: str
    module: nn.Module
    parent: nn.Module
    child: str

    @property
    def bare(self) -> nn.Module:
        """The model's own module here, below any wrapper."""
        return bare(self.module)


def walk(model: nn.Module) -> Iterator[Place]:
    """All places of a model below its root, by the model's own paths; a module that stands in several once."""
    seen, left = {id(model)}, _inside("", model)
    while left:
        place = left.pop()
        if id(place.module) not in seen:
            seen.add(id(place.module))
            yield place
            left += _inside(place.path, place.bare)


def _inside(path: str, module: nn.Module) -> list[Place]:
    """The places right inside a module, the last one first."""
    return [Place(below(path, n), m, module, n) for n, m in reversed(module._modules.items()) if m is not None]


def matches(path: str, names: Names | None) -> bool:
    """Whether a path is meant by `names`."""
    if names is None:
        return False
    if isinstance(names, str):
        return fullmatch(names, path)
    if isinstance(names, (set, frozenset)):
        return not names.isdisjoint(endings(path))
    return any(path == name or path.endswith(f".{name}") for name in names)


def layer_index(path: str, patterns: Iterable[str] | None) -> int | None:
    """The index of the block that a path lies in: the first number after a name (after the first of `patterns` that
    has one, if they are given)."""
    steps = [(name, part) for name, part in pairwise(path.split(".")) if part.isdigit()]
    for pattern in patterns or (".*",):
        for name, part in steps:
            if fullmatch(pattern, name):
                return int(part)
    return None


def in_layers(path: str, config: PeftConfig) -> bool:
    """Whether `layers_to_transform` lets a path through."""
    wanted = config.layers_to_transform
    if wanted is None:
        return True
    pattern = config.layers_pattern
    index = layer_index(path, [pattern] if isinstance(pattern, str) else pattern)
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def resolve(config: PeftConfig, entry: Entry, model: nn.Module, places: list[Place] | None = None) -> Names:
    """`target_modules` as names or a regex: `all-linear` written out, None filled from the method's table.

    places: all of the model's, where they are known already.
    """
    names = config.target_modules
    if isinstance(names, str) and names.lower() == ALL_LINEAR:
        places = list(walk(model)) if places is None else places
        return shortened(all_linear(model, places, config), [p.path for p in places])
    if names is not None:
        return names
    kind = model_type(model)
    if kind is None or kind not in entry.targets:
        known = sorted(entry.targets)
        raise ConfigError(
            f"{type(config).__name__}.target_modules is not given, and there is no default for "
            f"model_type={kind!r}{nearest(str(kind), known)} Name the layers to adapt, or give 'all-linear'."
        )
    default = entry.targets[kind]
    return default if isinstance(default, str) else set(default)


def model_type(model: nn.Module) -> str | None:
    """transformers' `model_type` of a model; None where it has no config."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        return config.get("model_type")
    return getattr(config, "model_type", None)


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model's input embedding has; None where it does not say which that is."""
    ask = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(ask(), "weight", None) if callable(ask) else None
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return None if weight is None else shape_of(weight)[0]


def all_linear(model: nn.Module, places: list[Place], config: PeftConfig) -> set[str]:
    """The paths of all linear layers but the output head, of all places of a model."""
    head: Any = None
    if callable(getter := getattr(model, "get_output_embeddings", None)):
        head = getter()
    names = set()
    for place in places:
        is_head = place.bare is head or (
            config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
            and any(part in HEADS for part in place.path.split("."))
        )
        if isinstance(site_of(place.bare), (Linear, Conv1D)) and not is_head:
            names.add(place.path)
    if not names:
        raise NoMatchingPeftModuleError(
            "target_modules='all-linear', but the model has no linear layer beside its head."
        )
    return names


def shortened(paths: set[str], all_paths: Iterable[str]) -> set[str]:
    """A long list of paths as the shortest endings that match them and nothing else."""
    if len(paths) < LONG:
        return paths
    others = {end for path in all_paths if path not in paths for end in endings(path)}
    return {next((end for end in reversed(list(endings(path))) if end not in others), path) for path in paths}


def targets(model: nn.Module, config: PeftConfig, names: Names, places: list[Place] | None = None) -> list[Place]:
    """The places that a config means, in the model's order. places: all of the model's, where they are known already.

    Raises `NoMatchingPeftModuleError`, with the nearest names there are, where nothing matches.
    """
    places = list(walk(model)) if places is None else places
    _check_regexes(config, len(places))
    named = [p for p in places if matches(p.path, names)]
    _check_layers(config, named)
    layered = [p for p in named if in_layers(p.path, config)]
    found = [p for p in layered if not matches(p.path, config.exclude_modules)]
    if found and not isinstance(names, str):
        _warn_of_idle(config, names, places)
    if found or config.target_parameters or (config.trainable_token_indices and not named and not names):
        return found
    raise NoMatchingPeftModuleError(_no_match(config, names, places, named, layered))


def _check_layers(config: PeftConfig, named: list[Place]) -> None:
    """Raise where some of `layers_to_transform` are not there; where all are not, `_no_match` tells."""
    wanted, pattern = config.layers_to_transform, config.layers_pattern
    if wanted is None:
        return
    patterns = [pattern] if isinstance(pattern, str) else pattern
    there = {i for p in named if (i := layer_index(p.path, patterns)) is not None}
    asked = {wanted} if isinstance(wanted, int) else set(wanted)
    if asked & there and (beyond := sorted(asked - there)):
        raise NoMatchingPeftModuleError(
            f"layers_to_transform has {listing(beyond)}, but no target module is in such a block. "
            f"Blocks there: {listing(sorted(there), 200)}."
        )


def _warn_of_idle(config: PeftConfig, names: Iterable[str], places: list[Place]) -> None:
    """Name the `target_modules` that match nothing while others do: a slip, or a file of another base."""
    idle = sorted(set(names) - {end for p in places for end in endings(p.path)})
    if idle and config.target_modules is not None:
        ends = {p.path.rpartition(".")[2] for p in places}
        hint = nearest(idle[0].rpartition(".")[2], ends) or "."
        warn(
            PatternWarning, f"target_modules has {listing(map(repr, idle))}, which match no module{hint}", stacklevel=7
        )


def _no_match(config: PeftConfig, names: Names, places: list[Place], named: list[Place], layered: list[Place]) -> str:
    shown = cut(names if isinstance(names, str) else sorted(names))
    if layered:
        return (
            f"exclude_modules={cut(config.exclude_modules)} leaves out every layer that target_modules={shown} matches."
        )
    if named:
        there = sorted({i for p in named if (i := layer_index(p.path, None)) is not None})
        return (
            f"target_modules={shown} matches {len(named)} layers, but none of them is in layers_to_transform="
            f"{config.layers_to_transform!r} (layers_pattern={config.layers_pattern!r}). "
            f"Blocks there: {listing(there)}."
        )
    ends = sorted({p.path.rpartition(".")[2] for p in places if not p.path.rpartition(".")[2].isdigit()})
    hints = "" if isinstance(names, str) else "".join(nearest(n.rpartition(".")[2], ends) for n in sorted(names)[:1])
    return f"target_modules={shown} matches no module of {len(places)}{hints or '.'} Names there: {listing(ends, 20)}."


def _check_regexes(config: PeftConfig, paths: int) -> None:
    """Raise `ConfigError` where a regex is none, or where there are too many for so many paths."""
    patterns = [name for name, value in vars(config).items() if name.endswith("_pattern") and isinstance(value, dict)]
    for name in ("target_modules", "exclude_modules", "layers_pattern", *patterns):
        value = getattr(config, name, None)
        plain = name.endswith("_modules") and not isinstance(value, str)  # a list of names holds no regex
        given = () if plain or not value else [value] if isinstance(value, str) else value
        if len(given) > limits.MAX_PATTERN_ENTRIES or len(given) * paths > limits.MAX_MATCHES:
            raise ConfigError(
                f"{type(config).__name__}.{name} has {len(given):,} entries, too many to be tried on {paths:,} modules; if "
                "they are meant, raise graftlet.limits.MAX_MATCHES."
            )
        for pattern in given:
            if not _PLAIN.fullmatch(pattern):
                whole = _at_end(pattern) if isinstance(value, dict) else pattern
                check(whole, f"{type(config).__name__}.{name}", shown=pattern)


_PLAIN = re.compile(r"[\w.-]+")
"""A regex that is a name: but for its dots, it matches itself."""


def _at_end(key: str) -> str:
    return rf"(.*\.)?({key})"


def by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value for a path in `rank_pattern` and its like: the first key that is its end, as a regex."""
    for key, value in (patterns or {}).items():
        if _ends(path, key) if _PLAIN.fullmatch(key) else fullmatch(_at_end(key), path):
            return value
    return default


def _ends(path: str, name: str) -> bool:
    """Whether a path ends in a name, in which a dot stands for anything."""
    head, tail = path[: -len(name)], path[-len(name) :]
    if head and not head.endswith("."):
        return False
    return tail == name or (len(tail) == len(name) and all(n in (".", t) for n, t in zip(name, tail, strict=True)))
