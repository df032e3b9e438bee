# SPDX-License-Identifier: Apache-2.0
"""One decorator, one table: every method that exists, by the name that stands in `adapter_config.json`."""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, UnknownMethodError, listing, nearest, shown

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """One registered method.

    name: `peft_type` in upper case; config: its dataclass; method: the class of its mathematics (a `core.method.Method`
    for layers, a prompt or block class for the model-level families); sites: the kinds of layer it works on;
    prefix: what its tensors' names begin with.
    """

    name: str
    config: type[Any]
    method: type
    sites: tuple[type, ...]
    prefix: str
    summary: str

    @property
    def targets(self) -> dict[str, Any]:
        """Default target modules by transformers' `model_type`."""
        return default_targets(self.name)

    @property
    def family(self) -> str:
        """The name of the base class that the method's mathematics derives from."""
        return next(c.__name__ for c in self.method.__mro__ if c.__module__.startswith("graftlet.core."))


_table: dict[str, Entry] = {}


def method(
    name: str,
    config: type[Any],
    *,
    sites: tuple[type, ...] = (),
    prefix: str | None = None,
) -> Callable[[T], T]:
    """Register the decorated class as the method `name`, configured by `config`.

    The first line of the module's docstring is the method's one-line summary in every generated table. A name that another
    class has raises `ConfigError`; a class may be defined anew.
    """

    def register(cls: T) -> T:
        key = name.upper()
        if not cls.__module__.startswith(f"{__package__}."):
            _load()  # the names of the package are taken, whether or not anybody has asked for them yet
        if (held := _table.get(key)) is not None and _place(held.method) != _place(cls):
            raise ConfigError(f"the method name {name!r} is taken, by {'.'.join(_place(held.method))}; choose another.")
        doc = (importlib.import_module(cls.__module__).__doc__ or cls.__doc__ or key).strip().splitlines()[0]
        _table[key] = Entry(key, config, cls, sites, prefix or f"{name.lower()}_", doc)
        config.peft_type_name = key
        return cls

    return register


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


@functools.cache
def default_targets(name: str) -> dict[str, Any]:
    """The table `name` of `methods/targets.json`: written out, or like another one with exceptions (None: left out)."""
    tables = json.loads(Path(__file__).with_name("methods").joinpath("targets.json").read_text())
    table = tables.get(name, {})
    if "like" not in table:
        return table
    merged = {**tables[table["like"]], **table["except"]}
    return {k: v for k, v in merged.items() if v is not None}


@functools.cache
def _load() -> None:
    """Import every module of `graftlet.methods` once; each registers what it defines."""
    package = importlib.import_module("graftlet.methods")
    for info in pkgutil.walk_packages(package.__path__, "graftlet.methods."):
        importlib.import_module(info.name)


def entries() -> Iterator[Entry]:
    """All methods, by name."""
    _load()
    return iter([_table[k] for k in sorted(_table)])


def lookup(name: object) -> Entry:
    """The entry of a method name, in any case, or an error that lists what exists."""
    key = str(getattr(name, "value", name)).upper()
    if key not in _table:
        _load()
    if key not in _table:
        raise UnknownMethodError(
            f"unknown method peft_type={shown(key)}{nearest(key, _table)} Known: {listing(sorted(_table), 60)}."
        )
    return _table[key]
