# SPDX-License-Identifier: Apache-2.0
"""Weights that accelerate keeps elsewhere between calls (`cpu_offload`, `disk_offload`, a `device_map` with "cpu" or "disk").

The module has the weight on the meta device; a hook on it knows where the numbers are, and puts them in place for a call of
the module alone. Whoever reads them outside such a call asks the hook.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .storage import Storage
from .whole import whole


def hook_of(module: nn.Module, name: str) -> Any:
    """The hook of accelerate's that knows where a module's tensor is; None where there is none."""
    hook = module.__dict__.get("_hf_hook")
    held = getattr(hook, "hooks", (hook,))  # a sequence of hooks is one
    return next((h for h in held if isinstance(m := getattr(h, "weights_map", None), Mapping) and name in m), None)


def present(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A module's tensor, on the device that it is computed on, wherever it is kept between calls."""
    hook = hook_of(module, name) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[name].to(hook.execution_device or "cpu")


def duplicate(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A copy of a module's tensor, a parameter of a parameter, that is there itself."""
    value = whole(present(module, name, tensor))
    if value is tensor:
        return copy.deepcopy(tensor)
    held = value.detach().clone()
    return nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held


def unhooked(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module without accelerate's hooks, which know the whole model's tensors. memo: as of `copy.deepcopy`."""
    hooks = {id(m.__dict__["_hf_hook"]): None for m in module.modules() if "_hf_hook" in m.__dict__}
    made = copy.deepcopy(module, {**memo, **hooks})
    for twin in made.modules() if hooks else ():
        for name in ("_hf_hook", "_old_forward", "forward"):
            twin.__dict__.pop(name, None)
    return made


class Offloaded(Storage):
    """Plain tensors, kept elsewhere. In memory they can be written; what is on disk is only read."""

    backend = "offloaded"

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        return self.read(module, name)

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return getattr(module, name).shape

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return getattr(module, name).dtype

    def read(self, module: nn.Module, name: str) -> Tensor:
        return present(module, name, getattr(module, name))

    def beside(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        hook = hook_of(module, name) if tensor.is_meta else None
        return tensor if hook is None else hook.weights_map[name]

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        held = hook_of(module, name).weights_map
        if held[name] is held[name]:
            return None
        return "accelerate keeps it on disk; load the model without offloading to disk, and merge there"

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        with torch.no_grad():
            hook_of(module, name).weights_map[name].copy_(value)

    def save(self, module: nn.Module, name: str) -> Tensor:
        return self.read(module, name).detach().clone()

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        if saved is not None:
            self.write(module, name, saved)


OFFLOADED = Offloaded()
