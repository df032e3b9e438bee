# SPDX-License-Identifier: Apache-2.0
"""Wrappers that turn a method into another: one file each, found by the config field that asks for it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from ...core.algebra import Factors, Thin
from ...core.method import Delta, Method, Spec, View
from ...errors import ConfigError
from ...weights.site import Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...config import PeftConfig
    from ...core.method import Holder


class Wrapper(Method):
    """A method around a `Delta`, which it asks for all that it does not change.

    sites: the layers it works on; all where empty. excludes: other fields of the config that it does not go with.
    starts: the values of `init_lora_weights` that it goes with; all where empty.
    """

    sites: ClassVar[tuple[type[Site], ...]] = ()
    excludes: ClassVar[tuple[str, ...]] = ()
    starts: ClassVar[tuple[str, ...]] = ()
    field: ClassVar[str] = ""

    def __init__(self, inner: Delta) -> None:
        self.inner = inner

    @classmethod
    def checks(cls, config: Any) -> None:
        """Raise `ConfigError` where a config's values do not go with the variant."""

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        if self.sites and not isinstance(site, self.sites):
            kinds = ", ".join(s.__name__ for s in self.sites)
            raise ConfigError(f"{self.field} works on {kinds}, not on {key!r}; exclude that layer.")
        return self.inner.settings(site, config, key)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return self.inner.params(site, p)

    def init(self, p: View) -> Tensor | None:
        return self.inner.init(p)

    def derived(self, config: PeftConfig) -> bool:
        return self.inner.derived(config)

    def link(self, layers: Mapping[str, Holder], adapter: str) -> None:
        self.inner.link(layers, adapter)

    def stacked(self, name: str, spec: Spec, experts: int) -> tuple[int, ...]:
        return self.inner.stacked(name, spec, experts)

    def unstacked(self, name: str, tensor: Tensor, experts: int) -> Tensor:
        return self.inner.unstacked(name, tensor, experts)


class DeltaWrapper(Wrapper, Delta):
    """A wrapper that is a `Delta` itself: the inner one's, of other factors (`seen`)."""

    derives = True

    def seen(self, p: View) -> View:
        """The view as the inner method has to see it."""
        return p

    def delta(self, p: View) -> Tensor:
        return self.inner.delta(self.seen(p))

    def factored(self, p: View) -> Factors | None:
        return self.inner.factored(self.seen(p))

    def thin(self, p: View) -> Thin | None:
        as_inner = type(self).update is DeltaWrapper.update and type(self).drop is DeltaWrapper.drop
        return self.inner.thin(self.seen(p)) if as_inner else None

    def delta_bias(self, p: View) -> Tensor | None:
        return self.inner.delta_bias(p)

    def drop(self, p: View, x: Tensor) -> Tensor:
        return self.inner.drop(p, x)

    def update(self, p: View, x: Tensor) -> Tensor:
        return self.inner.update(self.seen(p), x)


W = TypeVar("W", bound=type[Wrapper])
_table: dict[str, type[Wrapper]] = {}


def variant(field: str) -> Callable[[W], W]:
    """Register the decorated wrapper as what the config field `field` asks for."""

    def register(cls: W) -> W:
        cls.field = field
        _table[field] = cls
        return cls

    return register


@functools.cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def chosen(config: Any) -> type[Wrapper] | None:
    """The variant that a config asks for. Raises `ConfigError` for two."""
    _load()
    asked = sorted(field for field in _table if getattr(config, field, None) not in (None, False))
    if not asked:
        return None
    if len(asked) > 1:
        raise ConfigError(f"{type(config).__name__}: {' and '.join(asked)} do not go together; choose one.")
    return _table[asked[0]]


def check(config: Any, start: str) -> None:
    """Raise `ConfigError` where a config's values do not go with its variant, or with its start of this name."""
    kind = chosen(config)
    if kind is None:
        return
    for other in kind.excludes:
        if getattr(config, other, None):
            raise ConfigError(f"{type(config).__name__}: {kind.field} and {other} do not go together; choose one.")
    if kind.starts and start not in kind.starts:
        raise ConfigError(
            f"{type(config).__name__}: {kind.field} does not go with init_lora_weights={start!r}; "
            f"allowed: {', '.join(kind.starts)}."
        )
    kind.checks(config)


def wrapped(inner: Delta, config: Any) -> Method:
    """The method as the config wants it: wrapped in its variant, or itself."""
    kind = chosen(config)
    return inner if kind is None else kind(inner)
