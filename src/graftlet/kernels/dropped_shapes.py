# SPDX-License-Identifier: Apache-2.0
"""The thin products with dropout, on tensors without data: what they take, and nothing that is computed."""

from __future__ import annotations

from collections.abc import Sequence

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


def bits(x: Tensor, rate: float, count: int) -> Tensor:
    """A bit an entry of `x [n, k]`, several times over."""
    return x.new_empty(count, x.shape[0], x.shape[1] // WORD, dtype=torch.uint8)


def shrunk(x: Tensor, words: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`[n, r + ..]`."""
    return x.new_empty(PARTS, x.shape[0], sum(A.shape[0] for A in parts), dtype=torch.float32).sum(0).to(x.dtype)


def outer(dh: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """`[r, k]`, in single precision."""
    (k, r) = x.shape[1], dh.shape[1]
    return x.new_empty(rows_cut(k, r), r, k, dtype=torch.float32).sum(0)


def spread(parts: Sequence[tuple[Tensor, Tensor, Tensor]], into: Tensor | None) -> Tensor:
    """`[n, k]`."""
    dh, A, _ = parts[0]
    return dh.new_empty(dh.shape[0], A.shape[1]) if into is None else into
