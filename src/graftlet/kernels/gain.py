# SPDX-License-Identifier: Apache-2.0
"""DoRA's passes on a GPU: where its kernels serve, and what they take where tensors have no data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.kernel import in_triton, kind_of

KERNELS = "gain_triton"


def gained(z: Tensor, gain: Tensor) -> Tensor | None:
    """`z [..., m]` times a gain `[m]`; None where the plain way is as good."""
    if not _serves(z, gain):
        return None
    if z.is_meta:
        return torch.empty_like(z)
    with torch.cuda.device(z.device):  # kernels go to the device in use, which need not be the layer's
        return in_triton(KERNELS).gained(z.flatten(0, -2), gain).view(z.shape)


def regained(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of z and of the gain, the second in single precision; None where the plain way is as good."""
    if not _serves(z, gain) or not dy.is_contiguous():
        return None
    if z.is_meta:
        return torch.empty_like(z), gain.new_empty(gain.shape, dtype=torch.float32)
    with torch.cuda.device(z.device):
        dz, dgain = in_triton(KERNELS).regained(dy.flatten(0, -2), z.flatten(0, -2), gain)
    return dz.view(z.shape), dgain


def norms(squares: Tensor, across: Tensor, B: Tensor, gram: Tensor, scale: float) -> Tensor | None:
    """The norms of rows from what they are made of; None where the plain way is as good."""
    if not B.is_cuda or not (kernels := in_triton(KERNELS)) or B.shape[1] > kernels.LARGEST or not B.is_contiguous():
        return None
    with torch.cuda.device(B.device):
        return kernels.norms(squares, across, B, gram, scale)


def _serves(z: Tensor, gain: Tensor) -> bool:
    plain = type(z) is Tensor and z.is_contiguous() and gain.is_contiguous() and z.dim() > 1 and z.numel() > 0
    return plain and kind_of(z) == "cuda" and z.dtype != torch.float64 and (z.is_meta or in_triton(KERNELS) is not None)
