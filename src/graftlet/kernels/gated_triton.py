# SPDX-License-Identifier: Apache-2.0
"""Backward of a gated product `act(a) b` in one pass, in which the product is made again: each tensor is written over.

d <- act(a) b          b <- d act(a)          a <- d b act'(a)
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def pulled(gelu: bool, d: Tensor, a: Tensor, b: Tensor) -> None:
    """The three tensors, contiguous and alike, as above. gelu: the activation is gelu by tanh; else it is silu."""
    _pulled[(triton.cdiv(d.numel(), 1024),)](d, a, b, d.numel(), gelu, 1024, num_warps=4)


@triton.jit
def _pulled(d, a, b, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(d + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        s = tl.sigmoid(x)
        slope = s + x * s * (1 - s)
    act = (x * s).to(b.dtype.element_ty).to(tl.float32)  # rounded as forward does
    tl.store(d + at, (act * other).to(d.dtype.element_ty), mask=inside)
    tl.store(b + at, (grad * x * s).to(b.dtype.element_ty), mask=inside)
    tl.store(a + at, (grad * other * slope).to(a.dtype.element_ty), mask=inside)
