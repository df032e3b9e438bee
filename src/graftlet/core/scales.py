# SPDX-License-Identifier: Apache-2.0
"""Turning an adapter up or down on its layers: methods that resolve a `scaling` a layer can be scaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import ConfigError, listing
from .host import AdapterHost, hosts

SCALING = "scaling"


class Scales(AdapterHost):
    """A layer's scalings: what they are now (`scaling`), and what the adapters' configs make them."""

    cast_input_dtype_enabled: bool

    def note_scale(self, name: str, settings: Mapping[str, Any]) -> None:
        """Remember the scaling that an adapter came with."""
        if SCALING in settings:
            self.__dict__.setdefault("first_scaling", {})[name] = settings[SCALING]

    @property
    def scalings(self) -> dict[str, Any]:
        """The scalings in force, by adapter; empty where no method here has one."""
        return self.__dict__.get(SCALING, {})

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter act `scale` times as strongly as its config says. An adapter that is not here is passed over."""
        if adapter in self.scalings:
            self.scalings[adapter] = scale * self.__dict__["first_scaling"][adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' scalings, as they are now."""
        for name in self.active_adapters:
            if name in self.scalings:
                self.scalings[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' scalings, or bring them back to what the configs say."""
        for name in self.active_adapters:
            if scale is None:
                self.set_scale(name, 1.0)
            elif name in self.scalings:
                self.scalings[name] /= scale


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply all adapters' scalings until the block ends (WiSE-FT, arXiv 2109.01903, for 0 to 1).

    Raises `ConfigError` where the multiplier is no number, or no adapter of the model has a scaling.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise ConfigError(f"multiplier={multiplier!r} is a {type(multiplier).__name__}; a number is needed.")
    before = [(h, dict(h.scalings)) for _, h in hosts(model) if isinstance(h, Scales) and h.scalings]
    if not before:
        found = sorted({type(h).__name__ for _, h in hosts(model)})
        raise ConfigError(
            f"the model has no adapter with a scaling to multiply: {listing(found) or 'no adapter at all'}."
        )
    try:
        for host, scalings in before:
            host.scalings.update({name: value * multiplier for name, value in scalings.items()})
        yield
    finally:
        for host, scalings in before:
            host.scalings.update(scalings)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Until the block ends, leave the adapters' inputs in the dtype they come in: for hooks that cast layer by layer."""
    found = [h for _, h in hosts(model) if isinstance(h, Scales)] if active else []
    before = [h.cast_input_dtype_enabled for h in found]
    try:
        for host in found:
            host.cast_input_dtype_enabled = False
        yield
    finally:
        for host, was in zip(found, before, strict=True):
            host.cast_input_dtype_enabled = was
