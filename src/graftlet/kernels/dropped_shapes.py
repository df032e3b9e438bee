# SPDX-License-Identifier: Apache-2.0
"""The thin products with dropout, on tensors without data: what they take, and nothing that is computed."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 8
LARGEST = 256
PARTS = 4
"""Into how many parts the kernels cut a sum, at the least."""
BUSY = 2**21
"""So many entries of sums are in the making at once where a device is busy with them."""


def rows_cut(k: int, r: int) -> int:
    """Into how many parts a sum over rows is cut, whose result is `[r, k]`."""
    return max(PARTS, BUSY // (k * max(16, r)))


def bits(x: Tensor, rate: float) -> Tensor:
    """A bit an entry of `x [n, k]`."""
    return x.new_empty(x.shape[0], x.shape[1] // WORD, dtype=torch.uint8)


def shrunk(x: Tensor, words: Tensor, A: Tensor) -> Tensor:
    """`[n, r]`."""
    return x.new_empty(PARTS, x.shape[0], A.shape[0], dtype=torch.float32).sum(0).to(x.dtype)


def outer(dh: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """`[r, k]`, in single precision."""
    (k, r) = x.shape[1], dh.shape[1]
    return x.new_empty(rows_cut(k, r), r, k, dtype=torch.float32).sum(0)


def spread(dh: Tensor, A: Tensor, words: Tensor, into: Tensor | None) -> Tensor:
    """`[n, k]`."""
    return dh.new_empty(dh.shape[0], A.shape[1]) if into is None else into
