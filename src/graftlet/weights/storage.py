# SPDX-License-Identifier: Apache-2.0
"""How a weight is kept: plain here; one small file a quantised back end, found by the type's name.

A back end registers the qualified names of its module or tensor classes, so that nothing is imported to find out that
a layer is not one of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError


class Storage:
    """Plain tensors. A back end overrides `read`, `write`, `can_write` and, where its tensors are special, the rest."""

    can_read = True
    can_write = True

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight as an ordinary floating-point tensor. It may share memory with what is kept."""
        return getattr(module, name)

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Keep `value` in place of the weight, rounded to the kept precision, on the kept device."""
        if not self.can_write:
            raise MergeError(f"a {type(module).__name__} weight kept by {type(self).__name__} cannot be written.")
        with torch.no_grad():
            getattr(module, name).copy_(value)

    def save(self, module: nn.Module, name: str) -> Any:
        """All that `restore` needs to bring back the very bits."""
        value = getattr(module, name, None)
        return None if value is None else value.detach().clone()

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        """Bring back what `save` saw."""
        if saved is not None:
            with torch.no_grad():
                getattr(module, name).copy_(saved)


PLAIN = Storage()

BACKENDS: dict[str, str] = {}
"""Qualified class name (of the module, or of its weight tensor) -> 'module:attribute' of the Storage to import."""


def storage_of(module: nn.Module, name: str = "weight") -> Storage:
    """The storage that keeps `module`'s weight, by the type of the module or of the weight tensor."""
    for kind in (type(module), type(getattr(module, name, None))):
        for base in kind.__mro__:
            place = BACKENDS.get(f"{base.__module__}.{base.__qualname__}")
            if place is not None:
                home, _, attribute = place.partition(":")
                return getattr(importlib.import_module(home), attribute)
    return PLAIN
