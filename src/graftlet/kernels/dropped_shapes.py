# SPDX-License-Identifier: Apache-2.0
"""The thin products with dropout, on tensors without data: what they take, and nothing that is computed."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 8
LARGEST = 256
PARTS = 4
"""Into how many parts the kernels cut a sum."""


def bits(x: Tensor, rate: float) -> Tensor:
    """A bit an entry of `x [n, k]`."""
    return x.new_empty(x.shape[0], x.shape[1] // WORD, dtype=torch.uint8)


def shrunk(x: Tensor, words: Tensor, A: Tensor) -> Tensor:
    """`[n, r]`."""
    return x.new_empty(PARTS, x.shape[0], A.shape[0], dtype=torch.float32).sum(0).to(x.dtype)


def outer(dh: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """`[r, k]`, in single precision."""
    return x.new_empty(PARTS, dh.shape[1], x.shape[1], dtype=torch.float32).sum(0)


def spread(dh: Tensor, A: Tensor, words: Tensor, into: Tensor | None) -> Tensor:
    """`[n, k]`."""
    return dh.new_empty(dh.shape[0], A.shape[1]) if into is None else into
