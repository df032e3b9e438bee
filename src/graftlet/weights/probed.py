# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight is packed for a kernel: what such a layer gives for the identity is its weight.

Each number that comes out is one of the weight's times one, plus zeros, so it is the kernel's own to the bit. This holds
whatever order, tiles or tables a kernel wants, and of a format that several kernels run it needs no knowledge.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .storage import Fixed

ROWS = 2048
"""How many rows of the identity are asked for at a time."""


class Probed(Fixed):
    """A linear layer that is read by calling it, and cannot be written.

    packed, scales: the attributes, the first that there is, that tell the device and the dtype.
    """

    packed: ClassVar[tuple[str, ...]] = ("qweight", "weight")
    scales: ClassVar[tuple[str, ...]] = ("scales", "bias")

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        return first(module, self.packed)

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size([size(module, "out"), size(module, "in")])

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        held = [getattr(module, n, None) for n in self.scales]
        kinds = [t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point() and t.itemsize > 1]
        return kinds[0] if kinds else torch.float16

    @torch.no_grad()
    def read(self, module: nn.Module, name: str) -> Tensor:
        silent = without_bias(module)
        device, dtype = self.tensor(module, name).device, self.dtype(module, name)
        count = self.shape(module, name)[1]
        parts = []
        for start in range(0, count, ROWS):
            rows = torch.arange(start, min(start + ROWS, count), device=device)
            x = torch.zeros(len(rows), count, device=device, dtype=dtype)
            x[rows - start, rows] = 1
            parts.append(type(module).forward(silent, x).T)
        return torch.cat(parts, 1).to(dtype)


class Other(Probed):
    """gptqmodel's layers of other formats: GGUF, 8-bit floats, EXL3, VPTQ."""

    backend = "gptqmodel"


OTHER = Other()


def first(module: nn.Module, names: tuple[str, ...]) -> Tensor:
    """The first of these attributes that the module has."""
    return next(t for n in names if isinstance(t := getattr(module, n, None), Tensor))


def size(module: nn.Module, side: str) -> int:
    """`in_features` or `out_features`, which older packages spell without an underscore."""
    held: Any = getattr(module, f"{side}_features", None)
    return held if held is not None else getattr(module, f"{side}features")  # type: ignore[return-value]


def without_bias(module: nn.Module) -> nn.Module:
    """The same layer, of the same tensors, that adds no bias; the layer itself is not touched."""
    silent = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        own = dict(silent.__dict__[kind])
        if "bias" in own:
            own["bias"] = None
        silent.__dict__[kind] = own
    if "bias" in silent.__dict__:
        silent.__dict__["bias"] = None
    return silent
