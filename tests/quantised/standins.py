# SPDX-License-Identifier: Apache-2.0
"""Layers that need a GPU or a package that is not to be had here: their names, tensors and order, computed plainly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats import GROUP, IN, OUT, grouped, packed


def named(name: str) -> Any:
    """A class decorator: the class passes for this one."""

    def rename(cls: type) -> type:
        cls.__module__, _, cls.__qualname__ = name.rpartition(".")
        return cls

    return rename


@named("auto_gptq.nn_modules.qlinear.qlinear_cuda_old.QuantLinear")
class AutoGPTQ(nn.Module):
    """auto-gptq's layer: eight integers a word, zeros less one, `infeatures` and `outfeatures`."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures, self.bits, self.group_size = IN, OUT, 4, GROUP
        codes, scales, zeros = grouped(plain)
        self.register_buffer("qweight", packed(codes).T.contiguous())
        self.register_buffer("qzeros", packed(zeros.T - 1))
        self.register_buffer("scales", scales.T.half().contiguous())
        self.register_buffer("g_idx", torch.arange(IN, dtype=torch.int32) // GROUP)
        self.register_buffer("bias", plain.bias.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = ((self.qweight[:, None] >> shifts[:, None]) & 15).reshape(IN, OUT)
        zeros = ((self.qzeros[..., None] >> shifts) & 15).reshape(-1, OUT) + 1
        weight = self.scales[self.g_idx] * (codes - zeros[self.g_idx]).half()
        y = torch.matmul(x.half(), weight)
        return y if self.bias is None else y + self.bias


@named("neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear")
class PatchedLinear(nn.Module):
    """Intel's layer: weight `[in, out]`; its sizes are taken over from the linear layer that it was."""

    def __init__(self, plain: nn.Linear, each: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        largest = plain.weight.detach().abs().amax(1 if each else None)
        self.scale_weight = nn.Parameter(largest / 448, requires_grad=False)
        kept = (plain.weight.detach().T / self.scale_weight).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(kept.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale_weight) + self.bias


class Int8Kernel:
    """In the place of EETQ's: what it computes, with its integers in the order that they are given in."""

    @staticmethod
    def w8_a16_gemm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return x @ (weight.to(x.dtype) * scales.to(x.dtype))


class NVFP4Kernel:
    """In the place of the kernel of transformers' `NVFP4Linear`."""

    class PackedWeight:
        def __init__(self, **parts: Any) -> None:
            self.__dict__.update(parts)

    GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    @staticmethod
    def swizzled_sf_shape(n: int, k: int) -> tuple[int, int]:
        return n, k // 64 + 1

    @classmethod
    def gemm(cls, pw: Any, x: Tensor) -> Tensor:
        nibbles = torch.stack([pw.qweight & 15, pw.qweight >> 4], -1).reshape(pw.n, pw.k)
        values = torch.tensor(cls.GRID)[(nibbles & 7).long()] * torch.where(nibbles > 7, -1.0, 1.0)
        scale = pw.sf_rowmajor.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
        return nn.functional.linear(x, (values * scale / pw.global_scale).to(x.dtype))

    @classmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed numbers, scales row by row, and the scale of all."""
        whole = 6 * 448 / weight.abs().max()
        blocks = weight.unflatten(1, (-1, 16))
        scale = (blocks.abs().amax(-1) * whole / 6).to(torch.float8_e4m3fn)
        wanted = blocks * whole / scale.float()[..., None]
        found = (wanted.abs()[..., None] - torch.tensor(cls.GRID)).abs().argmin(-1) + 8 * (wanted < 0)
        codes = found.flatten(1).to(torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4, scale.view(torch.uint8), whole[None]
