# SPDX-License-Identifier: Apache-2.0
"""Whole blocks with a call of an adapter's around them: LLaMA-Adapter's attention, ShadowPEFT's second state."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import CallError, ConfigError, MergeError, listing
from .around import Block, Held
from .context import current
from .host import AdapterHost
from .method import Spec
from .tensors import Box, Boxes, Leaf, Networks, adapter_dtype, as_held, renamed, split

Tensors = tuple[dict[str, Spec], dict[str, Tensor]]


class BlockHost(AdapterHost):
    """Stands in for a block, which it holds under `inner`."""

    inner = "base_layer"
    transparent = True

    def __init__(self, block: nn.Module, method: Block) -> None:
        super().__init__()
        self._modules[self.inner] = block
        self.method = method
        self.specs: dict[str, dict[str, Spec]] = {}
        self.configs: dict[str, PeftConfig] = {}
        self.numbers: dict[str, int] = {}
        self.networks: dict[str, Networks] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if self.inner not in modules:
                raise
            return getattr(modules[self.inner], name)

    @property
    def adapters(self) -> list[str]:
        return list(self.specs)

    @property
    def base(self) -> nn.Module:
        return cast(nn.Module, self._modules[self.inner])

    @property
    def methods(self) -> dict[str, Block]:
        """The method of each adapter here."""
        return dict.fromkeys(self.specs, self.method)

    def attach(self, name: str, config: PeftConfig, made: Tensors, number: int = 0) -> None:
        """Take an adapter in. number: the block's place among those of the adapter."""
        self.specs[name], self.configs[name], self.numbers[name] = made[0], config, number
        self._learning.add(name)
        for tensor_name, spec in made[0].items():
            self.put(name, tensor_name, as_held(made[1][tensor_name], spec), spec)

    def view(self, name: str) -> Held:
        """What an adapter holds here."""
        tensors = {n: self.tensor(name, n) for n in self.specs[name]}
        return Held(name, tensors, self.configs, self.numbers[name], self.training, self.networks)

    def put(self, adapter: str, tensor_name: str, tensor: Tensor, spec: Spec) -> None:
        """Hold one tensor of an adapter."""
        raise NotImplementedError

    def tensor(self, adapter: str, tensor_name: str) -> Tensor:
        """One tensor of an adapter, by its name in memory."""
        raise NotImplementedError

    def check_together(self, names: list[str]) -> None:
        if len(here := [n for n in names if n in self.specs]) > 1:
            raise ConfigError(f"{listing(here)} act on whole blocks, which take one adapter at a time; activate one.")

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        for held in (self.specs, self.configs, self.numbers):
            renamed(held, old, new)

    def forget(self, name: str) -> None:
        for held in (self.specs, self.configs, self.numbers):
            held.pop(name)
        self._learning.discard(name)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        held = {s.disk or n: self.tensor(name, n) for n, s in self.specs.get(name, {}).items()}
        return {key: tensor for key, tensor in held.items() if isinstance(tensor, nn.Parameter)}

    def state(self, name: str) -> dict[str, Tensor]:
        return dict(self.trainable(name))

    def assign(self, name: str, key: str, value: Tensor) -> None:
        tensor_name, spec = next((n, s) for n, s in self.specs[name].items() if (s.disk or n) == key)
        held = self.tensor(name, tensor_name)
        if held.is_meta:
            place = next(self.base.parameters()).device
            made = nn.Parameter(value.to(place, held.dtype, copy=True), held.requires_grad)
            self.put(name, tensor_name, made, spec)
        else:
            held.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is not None and call.rows is not None and not self.off(call):
            raise CallError(f"{type(self.method).__name__} acts on whole blocks, which cannot be mixed in a batch.")
        names = self.acting(call)
        if not names:
            return self.base(*args, **kwargs)
        return self.method.call(self.view(names[0]), self.base, args, kwargs)

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        if names := self.to_merge(adapter_names):
            raise MergeError(f"adapter {names[0]!r} cannot be merged: {self.method.unmergeable}.")

    def unmerge(self) -> None:
        """Nothing is ever merged into a block."""


class BoxedBlock(Boxes, BlockHost):
    """A block whose adapters stand in boxes, as those of layers do: `shadow_up["default"]`."""

    def rename(self, old: str, new: str) -> None:
        for box in {split(tensor_name)[0] for tensor_name in self.specs.get(old, ())}:
            self._box(box).rename(old, new)
        super().rename(old, new)

    def forget(self, name: str) -> None:
        for box in {split(tensor_name)[0] for tensor_name in self.specs[name]}:
            self._box(box).drop(name)
        super().forget(name)


class AdaptedBlock(BlockHost):
    """A block in a format that has no level for the adapter.

    The active adapter's tensors are the parameters of this module (`adaption_prompt`), those of the others are parked in
    `self.parked` under their adapter's name.
    """

    inner = "model"

    def __init__(self, block: nn.Module, method: Block) -> None:
        super().__init__(block, method)
        self._modules["parked"] = Box()
        self._shown: str | None = None

    def put(self, adapter: str, tensor_name: str, tensor: Tensor, spec: Spec) -> None:
        if adapter != self._shown and adapter not in self.parked:
            self.parked.put(adapter, Leaf())
        held = self._parameters if self._shown == adapter else self.parked[adapter]._parameters
        held[tensor_name] = cast(nn.Parameter, tensor)

    def tensor(self, adapter: str, tensor_name: str) -> Tensor:
        held = self._parameters if self._shown == adapter else self.parked[adapter]._parameters
        return cast(Tensor, held[tensor_name])

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
        self._shown = new if self._shown == old else self._shown

    def forget(self, name: str) -> None:
        if self._shown == name:
            self._show(None)
        self.parked.drop(name)
        super().forget(name)


def host_for(block: nn.Module, method: Block) -> BlockHost:
    """A wrapper for a block, as the method's format has it."""
    return (BoxedBlock if method.boxed else AdaptedBlock)(block, method)


def started(method: Block, block: nn.Module, config: Any, model: nn.Module, meta: bool, widen: bool) -> Tensors:
    """An adapter's tensors for a block, started unless they are on meta."""
    specs = method.params(block, config, model)
    like = next(p for p in block.parameters() if p.is_floating_point())
    device, dtype = "meta" if meta else like.device, adapter_dtype(like.dtype, widen and method.boxed)
    tensors = {n: torch.empty(s.shape, dtype=s.dtype or dtype, device=device) for n, s in specs.items()}
    if not meta:
        method.init(tensors, config)
    return specs, tensors
