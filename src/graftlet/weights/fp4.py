# SPDX-License-Identifier: Apache-2.0
"""Floats of 4 bits (E2M1), two a byte, with a scale a block, itself a float of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .storage import Fixed

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(codes: Tensor) -> Tensor:
    """`[..., n]` bytes as `[..., 2 n]` numbers: the low four bits first, the highest of four the sign."""
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], device=codes.device)
    pairs = torch.stack([codes & 15, codes >> 4], -1)
    return table[pairs.flatten(-2).int()]


class NVFP4(Fixed):
    """transformers' `NVFP4Linear`: weight `[out, in / 2]`, scales `[out, in / 16]`, and one for all to divide by."""

    backend = "NVFP4"
    why = "its scales stand a second time in an order that only its kernel can make"

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size([module.out_features, module.in_features])  # type: ignore[list-item]

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, module: nn.Module, name: str) -> Tensor:
        kept = self.tensor(module, name)
        if kept.is_floating_point():
            return kept
        scales = module.weight_sf_rowmajor.view(torch.float8_e4m3fn).float()  # type: ignore[operator]
        wide = unpacked(kept) * scales.repeat_interleave(16, 1) / module.weight_global_scale  # type: ignore[operator]
        return wide.to(torch.bfloat16)


NVFP4_LINEAR = NVFP4()
