# SPDX-License-Identifier: Apache-2.0
"""DoRA's passes on a GPU: where its kernels serve, and what they take where tensors have no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.kernel import DTYPES, HALVES, capturing, in_triton, kind_of, on_device_of

KERNELS = "gain_triton"


def gained(z: Tensor, gain: Tensor) -> Tensor | None:
    """`z [..., m]` times a gain `[m]`; None where the plain way is as good."""
    if not _serves(z, gain):
        return None
    if z.is_meta:
        return torch.empty_like(z)
    with on_device_of(z):
        return in_triton(KERNELS).gained(z.flatten(0, -2), gain).view(z.shape)


def regained(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of z and of the gain, the second in single precision; None where the plain way is as good."""
    if not _serves(z, gain) or not dy.is_contiguous():
        return None
    if z.is_meta:
        return torch.empty_like(z), gain.new_empty(gain.shape, dtype=torch.float32)
    with on_device_of(z):
        dz, dgain = in_triton(KERNELS).regained(dy.flatten(0, -2), z.flatten(0, -2), gain)
    return dz.view(z.shape), dgain


Asked = tuple[Tensor, Tensor, Tensor, Tensor, float]
"""W, A, B, |w|^2 of each row, and the scale."""


def norms(asked: Sequence[Asked]) -> list[Tensor] | None:
    """The norms of the rows of `W + s B A`, of all that are asked in one pass; None where the plain way is as good."""
    W, A = asked[0][:2]
    if not W.is_cuda or W.dtype not in HALVES or A.dtype not in DTYPES or capturing(W.device):
        return None
    if not (kernels := in_triton(KERNELS)):
        return None
    dtypes, largest = (W.dtype, A.dtype, A.dtype, torch.float32), kernels.LARGEST
    if not all(_even(tensors, dtypes, largest) for *tensors, _ in asked):
        return None
    with on_device_of(W):
        return kernels.norms(asked)


def _even(tensors: list[Tensor], dtypes: tuple[torch.dtype, ...], largest: int) -> bool:
    """Whether the kernel's tiles fit these."""
    same = all(
        t.dtype == dtype and t.is_contiguous() and t.data_ptr() % 16 == 0
        for t, dtype in zip(tensors, dtypes, strict=True)
    )
    return same and tensors[0].shape[1] % 16 == 0 and 0 < tensors[1].shape[0] <= largest


def _serves(z: Tensor, gain: Tensor) -> bool:
    plain = type(z) is Tensor and z.is_contiguous() and gain.is_contiguous() and z.dim() > 1 and z.numel() > 0
    return plain and kind_of(z) == "cuda" and z.dtype != torch.float64 and (z.is_meta or in_triton(KERNELS) is not None)
