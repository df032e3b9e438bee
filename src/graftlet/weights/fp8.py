# SPDX-License-Identifier: Apache-2.0
"""Floats of 8 bits with a scale: one for the whole weight, one an output, or one a block.   W = F s"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .storage import Packed, Storage


class Float8(Packed):
    """A linear layer with a weight of 8-bit floats and scales that it is multiplied by.

    scale: the attribute with the scales. transposed: the weight stands as `[in, out]`.
    Once a layer has been given back a wide weight it is a plain one.
    """

    backend = "FP8"
    scale: ClassVar[str] = "weight_scale"
    transposed: ClassVar[bool] = False

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        kept = self.tensor(module, name)
        return torch.Size(reversed(kept.shape)) if self.transposed else kept.shape

    def read(self, module: nn.Module, name: str) -> Tensor:
        kept = self._kept(module, name)
        if kept.itemsize > 1:
            return kept
        return kept.float() * self._spread(module, name, self._grid(module, name).float())

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Each block gets the scale by which its largest number is the largest that a float of 8 bits can be."""
        kept = self._kept(module, name)
        if kept.itemsize > 1:
            kept.copy_(value)
            return
        value = value.to(kept.device, torch.float32)
        grid, limit = self._grid(module, name), torch.finfo(kept.dtype).max
        found = self._largest(module, name, value) / limit
        found = torch.where(found > 0, found, torch.ones_like(found))
        if grid.dtype.itemsize == 1:  # powers of two alone
            found = found.log2().ceil().exp2()
        grid.copy_(found)
        kept.copy_((value / self._spread(module, name, grid.float())).clamp(-limit, limit))

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        kept = self._kept(module, name)
        if kept.itemsize > 1:
            return Storage.allowed(self, module, name, meant)
        kind = torch.finfo(kept.dtype)
        return self._spread(module, name, self._grid(module, name).float()) * (kind.max * kind.eps / 2)

    def save(self, module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        return self.tensor(module, name).detach().clone(), getattr(module, self.scale).detach().clone()

    @torch.no_grad()
    def restore(self, module: nn.Module, name: str, saved: tuple[Tensor, Tensor]) -> None:
        self.tensor(module, name).copy_(saved[0])
        getattr(module, self.scale).copy_(saved[1])

    def block(self, module: nn.Module, name: str) -> tuple[int, int]:
        """The rows and columns that one scale is for."""
        out, columns = self.shape(module, name)
        rows, across = self._grid(module, name).shape
        return math.ceil(out / rows), math.ceil(columns / across)

    def _kept(self, module: nn.Module, name: str) -> Tensor:
        kept = self.tensor(module, name).detach()
        return kept.T if self.transposed else kept

    def _grid(self, module: nn.Module, name: str) -> Tensor:
        """The scales as a matrix: a view, `[1, 1]`, `[out, 1]` or `[blocks of rows, blocks of columns]`."""
        held = getattr(module, self.scale).detach()
        if held.numel() == 1:
            return held.view(1, 1)
        return held.view(-1, 1) if held.numel() == self.shape(module, name)[0] else held

    def _spread(self, module: nn.Module, name: str, grid: Tensor) -> Tensor:
        """Each scale at all places that it is for."""
        shape, (rows, columns) = self.shape(module, name), self.block(module, name)
        return grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]

    def _largest(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        """The largest absolute value of each block."""
        rows, columns = self.block(module, name)
        short = -value.shape[0] % rows, -value.shape[1] % columns
        whole = nn.functional.pad(value.abs(), (0, short[1], 0, short[0]))
        return whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))


class Blocks(Float8):
    """transformers' `FP8Linear`: blocks of a stated size; `weight_scale_inv` is what one multiplies by."""

    scale = "weight_scale_inv"

    def _grid(self, module: nn.Module, name: str) -> Tensor:
        held = getattr(module, self.scale).detach()
        return held if held.dim() == 2 else held.view(1, 1)

    def block(self, module: nn.Module, name: str) -> tuple[int, int]:
        stated: tuple[int, int] | None = getattr(module, "block_size", None)
        return stated or super().block(module, name)


class Patched(Float8):
    """Intel Neural Compressor's `PatchedLinear`: weight `[in, out]`, one scale or one an output."""

    backend = "Intel INC"
    scale = "scale_weight"
    transposed = True

    def unreadable(self, module: nn.Module, name: str) -> str | None:
        if isinstance(getattr(module, self.scale, None), Tensor):
            return None
        return "this layer is only measured, or works with simulated numbers, and has no scale of its weight"

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        return (
            "its scale was calibrated together with those of its inputs; merge with dequantize=True, or merge into the model "
            "that it was made from and quantise that"
        )


SCALED, BLOCKS, PATCHED = Float8(), Blocks(), Patched()
