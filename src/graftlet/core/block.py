# SPDX-License-Identifier: Apache-2.0
"""Whole blocks with a call of an adapter's around them: LLaMA-Adapter's attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CallError, MergeError
from .context import current
from .host import AdapterHost
from .method import Block, Spec
from .tensors import Box, Leaf, as_held, renamed


class AdaptedBlock(AdapterHost):
    """Stands in for a block, which is `self.model`.

    The format has no level for the adapter here: the active adapter's tensors are the parameters of this module
    (`adaption_prompt`), those of the others are parked in `self.parked` under their adapter's name.
    """

    def __init__(self, block: nn.Module, method: Block) -> None:
        super().__init__()
        self._modules["model"], self._modules["parked"] = block, Box()
        self.method = method
        self.specs: dict[str, dict[str, Spec]] = {}
        self._shown: str | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if "model" not in modules:
                raise
            return getattr(modules["model"], name)

    @property
    def adapters(self) -> list[str]:
        return list(self.specs)

    @property
    def base(self) -> nn.Module:
        return cast(nn.Module, self._modules["model"])

    def attach(self, name: str, specs: dict[str, Spec], tensors: dict[str, Tensor]) -> None:
        """Take an adapter in, parked until it is activated."""
        leaf = Leaf()
        for tensor_name, spec in specs.items():
            leaf.register_parameter(tensor_name, cast(nn.Parameter, as_held(tensors[tensor_name], spec)))
        self.parked.put(name, leaf)
        self.specs[name] = specs
        self._learning.add(name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._show(next((n for n in self._active if n in self.specs), None))

    def follow(self, active: list[str]) -> None:
        super().follow(active)
        self._show(next((n for n in self._active if n in self.specs), None))

    def _show(self, name: str | None) -> None:
        """Let this adapter's tensors, and no other's, be the module's own."""
        if self._shown is not None and self._shown in self.specs:
            leaf = Leaf()
            for tensor_name in self.specs[self._shown]:
                leaf.register_parameter(tensor_name, self._parameters.pop(tensor_name))
            self.parked.put(self._shown, leaf)
        self._shown = name
        if name is not None:
            for tensor_name, parameter in self.parked[name]._parameters.items():
                self._parameters[tensor_name] = parameter
            self.parked.drop(name)

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self.parked.rename(old, new)
        renamed(self.specs, old, new)
        self._shown = new if self._shown == old else self._shown

    def forget(self, name: str) -> None:
        if self._shown == name:
            self._show(None)
        self.parked.drop(name)
        self.specs.pop(name)
        self._learning.discard(name)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.specs:
            return {}
        held = self._parameters if self._shown == name else self.parked[name]._parameters
        return {n: cast(nn.Parameter, held[n]) for n in self.specs[name]}

    def state(self, name: str) -> dict[str, Tensor]:
        return dict(self.trainable(name))

    def assign(self, name: str, key: str, value: Tensor) -> None:
        held = self._parameters if self._shown == name else self.parked[name]._parameters
        old = cast(nn.Parameter, held[key])
        if old.is_meta:
            place = next(self.base.parameters()).device
            held[key] = nn.Parameter(value.to(place, old.dtype, copy=True), old.requires_grad)
        else:
            old.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is not None and call.rows is not None and not self.off(call):
            raise CallError(f"{type(self.method).__name__} acts on whole blocks, which cannot be mixed in a batch.")
        names = self.acting(call)
        if not names:
            return self.base(*args, **kwargs)
        return self.method.call(self.trainable(names[0]), self.base, args, kwargs)

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        if names := self.to_merge(adapter_names):
            raise MergeError(f"adapter {names[0]!r} cannot be merged: {self.method.unmergeable}.")

    def unmerge(self) -> None:
        """Nothing is ever merged into a block."""


def started(method: Block, block: nn.Module, config: Any, meta: bool) -> tuple[dict[str, Spec], dict[str, Tensor]]:
    """An adapter's tensors for a block, started unless they are on meta."""
    specs = method.params(block, config)
    like = next(p for p in block.parameters() if p.is_floating_point())
    device = "meta" if meta else like.device
    tensors = {n: torch.empty(s.shape, dtype=s.dtype or like.dtype, device=device) for n, s in specs.items()}
    if not meta:
        method.init(tensors)
    return specs, tensors
