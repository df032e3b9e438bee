# SPDX-License-Identifier: Apache-2.0
"""Layers in few bits, without data: what their weights take, and what a call of them makes for a moment and keeps.

They stand for bitsandbytes' layers, which need a device to be made on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...weights.storage import BACKENDS, Fixed, qualified

SCALES = 64
"""Weights that share a scale in 4 bits; 256 of the scales share one again where they are quantised themselves."""
NESTED = 256


@dataclass(frozen=True)
class Format:
    """How weights are kept. bits: of a weight. double: the scales of 4 bits are quantised as well."""

    bits: int
    double: bool = True

    def sizes(self, rows: int, columns: int) -> list[tuple[int, torch.dtype]]:
        """The tensors beside the numbers themselves: their lengths and dtypes."""
        if self.bits == 8:
            return [(rows, torch.float32)]
        blocks = -(-rows * columns // SCALES)
        table = [(16, torch.float32)]
        if not self.double:
            return [(blocks, torch.float32), *table]
        return [(blocks, torch.uint8), (-(-blocks // NESTED), torch.float32), (256, torch.float32), *table]


FORMATS = {"nf4": Format(4), "fp4": Format(4), "int8": Format(8)}


class PackedLinear(nn.Module):
    """A linear layer `[out, in]` in few bits; `compute` is the dtype that its product is made in."""

    def __init__(self, plain: nn.Linear, kept: Format, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.kept, self.compute, self.bias = kept, compute, plain.bias
        count = self.in_features * self.out_features
        numbers = torch.empty(count * kept.bits // 8, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(numbers, requires_grad=False)
        for i, (size, dtype) in enumerate(kept.sizes(self.out_features, self.in_features)):
            self.register_buffer(f"scales_{i}", torch.empty(size, dtype=dtype, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = _Product.apply(x.to(self.compute), self.weight, self)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        """The weight as it is for the time of a product."""
        if self.kept.bits == 4 and self.kept.double:
            self.weight.new_empty(self.weight.numel() * 2 // SCALES, dtype=torch.float32)
        return self.weight.new_zeros(self.out_features, self.in_features, dtype=self.compute)


class _Product(torch.autograd.Function):
    """`x W^T`. In 8 bits the input is rounded too, and kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        if layer.kept.bits == 8:
            ctx.save_for_backward(x)
            x = x.to(torch.float16)
            rounded = torch.empty_like(x, dtype=torch.int8)
            sums = x.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
            del rounded, sums
        return x.to(layer.compute) @ layer.dense().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] @ ctx.layer.dense(), None, None


class PackedStorage(Fixed):
    """How `PackedLinear` keeps its weight."""

    backend = "few bits"

    def shape(self, module: Any, name: str) -> torch.Size:
        return torch.Size((module.out_features, module.in_features))

    def dtype(self, module: Any, name: str) -> torch.dtype:
        return module.compute

    def computes_in(self, module: Any, name: str) -> torch.dtype | None:
        return module.compute if module.kept.bits == 4 else None

    def read(self, module: Any, name: str) -> Tensor:
        return module.dense()


STORAGE = PackedStorage()
BACKENDS[qualified(PackedLinear)] = f"{__name__}:STORAGE"


def pack(model: nn.Module, kept: Format, compute: torch.dtype, skip: list[str]) -> None:
    """Keep a model's linear layers in few bits, but for what `skip` names, or else its head."""
    heads = [] if skip else _heads(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in skip and child not in heads:
                setattr(parent, name, PackedLinear(child, kept, compute))


def _heads(model: nn.Module) -> list[Any]:
    """What transformers leaves as it is of itself: the output embeddings, and the module of the last weight."""
    ask = getattr(model, "get_output_embeddings", None)
    owner, _, name = [name for name, _ in model.named_parameters()][-1].rpartition(".")
    return [ask() if callable(ask) else None, model.get_submodule(owner) if name == "weight" else None]
