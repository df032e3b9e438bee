# SPDX-License-Identifier: Apache-2.0
"""Rows of one token each with adapters of their own, in a CUDA graph: where only the device's time counts.

Outside of a graph the host has too little time to start these kernels, and torch's own products are as quick. They are made
ready in the calls that warm up for a graph, which run on a stream of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.kernel import capturing, in_triton, on_device_of

LARGEST = 128
"""The largest rank that the tiles are made for."""

_ready: set[tuple[Any, ...]] = set()


def added(y: Tensor, x: Tensor, A: Tensor, B: Tensor, owner: Tensor) -> Tensor | None:
    """y `[n, 1, m]`, written over, with what each row's adapter adds; None where the plain way is as good."""
    if not x.is_cuda or x.shape[1] != 1 or A.shape[1] > LARGEST or not (kernel := in_triton("rows_triton")):
        return None
    key = (x.dtype, x.device, A.shape[1:], B.shape[1], x.stride(0), y.stride(0))
    warms_up = torch._C._cuda_getCurrentRawStream(x.device.index) != 0  # the default stream
    if not (key in _ready if capturing(x.device) else warms_up):
        return None
    _ready.add(key)
    with on_device_of(x):
        kernel.added(y[:, 0], x[:, 0], A, B, owner)
    return y
