# SPDX-License-Identifier: Apache-2.0
"""How a weight is kept: plain here; one small file a quantised back end, found by the type's name.

`BACKENDS` names the classes of modules, or of weight tensors, that each back end answers for. So nothing is imported to
find out that a layer is not one of its own, and a back end that is half installed breaks nobody who does not use it.
A back end's file may import it at its top: it is loaded once a layer of its kind is met.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

WIDE = 2
"""Bytes that a number has at least in a dtype that anything is computed in."""


class Storage:
    """Plain tensors, and what every back end answers.

    `module` is a layer and `name` what its weight is called, "weight" on all layers of back ends. A back end overrides
    what differs: `tensor` where the packed weight has another name; `shape` and `dtype` where they are not the packed
    tensor's; `read`, and `pack` or `write`; `save`, `restore` and `recall` where the bits are more than one tensor.

    backend: what it is called in tables and messages; "" for plain tensors.
    """

    backend: ClassVar[str] = ""

    # what is there

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        """The tensor as kept, which may be packed: it tells the device, and which layers share it."""
        return getattr(module, name)

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        """The weight's shape in the layer's own layout: `[out, in]` for a linear layer, however it is packed."""
        return self.tensor(module, name).shape

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """What the layer computes in, and what `read` gives: single precision where numbers of one byte are kept."""
        kept = self.tensor(module, name).dtype
        return kept if kept.is_floating_point and kept.itemsize >= WIDE else torch.float32

    # what can be done

    def unreadable(self, module: nn.Module, name: str) -> str | None:
        """Why the weight cannot be read, as the end of a sentence; None where it can."""
        return None

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        """Why another weight cannot be kept, as the end of a sentence; None where it can."""
        return self.unreadable(module, name)

    def can_read(self, module: nn.Module, name: str = "weight") -> bool:
        return self.unreadable(module, name) is None

    def can_write(self, module: nn.Module, name: str = "weight") -> bool:
        return self.unwritable(module, name) is None

    # the weight

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight as an ordinary floating-point tensor, `shape` and `dtype` as above. It may share what is kept."""
        return getattr(module, name)

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Keep `value` in place of the weight, rounded to the kept precision, on the kept device."""
        with torch.no_grad():
            getattr(module, name).copy_(value)

    # its bits

    def save(self, module: nn.Module, name: str) -> Any:
        """All that `restore` needs to bring back the very bits, sharing nothing with what is kept."""
        value = getattr(module, name, None)
        return None if value is None else value.detach().clone()

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        """Bring back what `save` saw, on the device that the layer is on now."""
        if saved is not None:
            with torch.no_grad():
                getattr(module, name).copy_(saved)

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        """What `read` would have given when `saved` was made, without changing anything."""
        return saved


class Packed(Storage):
    """The base of quantised back ends. A subclass gives `backend`, `shape`, `dtype`, `read`, `write`, `save`, `restore`.

    Reading what was saved is then restoring it for a moment, unless the subclass knows better.
    """

    def read(self, module: nn.Module, name: str) -> Tensor:
        raise NotImplementedError

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        raise NotImplementedError

    def save(self, module: nn.Module, name: str) -> Any:
        raise NotImplementedError

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        raise NotImplementedError

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        now = self.save(module, name)
        try:
            self.restore(module, name, saved)
            return self.read(module, name)
        finally:
            self.restore(module, name, now)


PLAIN = Storage()

BACKENDS: dict[str, str] = {
    "bitsandbytes.nn.modules.Linear4bit": "graftlet.weights.bnb:FOUR_BIT",
    "bitsandbytes.nn.modules.Params4bit": "graftlet.weights.bnb:FOUR_BIT",
}
"""Qualified class name (of the module, or of its weight tensor) -> 'module:attribute' of the Storage to import.

A class of modules named here that derives from no layer of torch's is a linear layer with `in_features` and `out_features`.
"""


def storage_of(module: nn.Module, name: str = "weight") -> Storage:
    """The storage that keeps `module`'s weight, by the type of the module or of the weight tensor."""
    if (home := _home(type(module))) is not None:
        return _load(home)
    held: Any = module._parameters.get(name)
    if type(held) is nn.Parameter:
        return PLAIN
    home = _home(type(getattr(module, name, None) if held is None else held))
    return PLAIN if home is None else _load(home)


def packed(module: nn.Module) -> bool:
    """Whether a module is a quantised back end's own kind of layer."""
    return _home(type(module)) is not None


def qualified(kind: type) -> str:
    """The name by which a class is found without importing it."""
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.lru_cache(maxsize=4096)
def _home(kind: type) -> str | None:
    return next((BACKENDS[name] for base in kind.__mro__ if (name := qualified(base)) in BACKENDS), None)


@functools.cache
def _load(home: str) -> Storage:
    place, _, attribute = home.partition(":")
    return getattr(importlib.import_module(place), attribute)
