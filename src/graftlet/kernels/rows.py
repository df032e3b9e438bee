# SPDX-License-Identifier: Apache-2.0
"""Rows of one token each with adapters of their own, in a CUDA graph: where only the device's time counts.

Outside of a graph the host has too little time to start these kernels, and torch's own products are as quick. They are made
ready in the calls that warm up for a graph, which run on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.kernel import capturing, in_triton, on_device_of, stream_of

LARGEST = 128
"""The largest rank that the tiles are made for."""

_ready: set[tuple[Any, ...]] = set()


def begun(x: Tensor, A: Tensor, B: Tensor, owner: Tensor) -> Callable[[Tensor, Tensor | None], None] | None:
    """What each row's adapter makes of x `[n, ..., k]`, as far as the thin product. The rest is to be called with y
    `[n, 1, m]`, which it is written to, and what it is added to. None where the plain way is as good.
    """
    if not x.is_cuda or stream_of(x.device) == 0:  # the default stream
        return None
    count, k = x.shape[0], x.shape[-1]
    if not 0 < x.numel() == count * k or x.stride(-1) != 1 or A.shape[1] > LARGEST:
        return None
    rows, kernel = x.view(count, k), in_triton("rows_triton")
    key = (x.dtype, x.device, A.shape[1:], B.shape[1], rows.stride(0))
    if kernel is None or (key not in _ready and capturing(x.device)):
        return None
    _ready.add(key)
    with on_device_of(x):
        h = kernel.shrunk(rows, A, owner)

    def rest(y: Tensor, start: Tensor | None) -> None:
        with on_device_of(y):
            kernel.expand(y[:, 0], None if start is None else start[:, 0], h, B, owner)

    return rest
