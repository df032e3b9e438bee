# SPDX-License-Identifier: Apache-2.0
"""DoRA's passes on a GPU: where its kernels serve, and what they take where tensors have no data."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..core.kernel import kind_of


def gained(z: Tensor, gain: Tensor) -> Tensor | None:
    """`z [..., m]` times a gain `[m]`; None where the plain way is as good."""
    if not _serves(z, gain):
        return None
    return torch.empty_like(z) if z.is_meta else _kernels().gained(z.flatten(0, -2), gain).view(z.shape)


def regained(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of z and of the gain, the second in single precision; None where the plain way is as good."""
    if not _serves(z, gain) or not dy.is_contiguous():
        return None
    if z.is_meta:
        return torch.empty_like(z), gain.new_empty(gain.shape, dtype=torch.float32)
    dz, dgain = _kernels().regained(dy.flatten(0, -2), z.flatten(0, -2), gain)
    return dz.view(z.shape), dgain


def norms(squares: Tensor, across: Tensor, B: Tensor, gram: Tensor, scale: float) -> Tensor | None:
    """The norms of rows from what they are made of; None where the plain way is as good."""
    if not B.is_cuda or not (kernels := _kernels()) or B.shape[1] > kernels.LARGEST or not B.is_contiguous():
        return None
    return kernels.norms(squares, across, B, gram, scale)


def _serves(z: Tensor, gain: Tensor) -> bool:
    plain = type(z) is Tensor and z.is_contiguous() and gain.is_contiguous() and z.dim() > 1 and z.numel() > 0
    return plain and kind_of(z) == "cuda" and z.dtype != torch.float64 and (z.is_meta or _kernels() is not None)


@functools.cache
def _kernels() -> Any:
    """The kernels' module, where Triton is there."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("graftlet.kernels.gain_triton")
