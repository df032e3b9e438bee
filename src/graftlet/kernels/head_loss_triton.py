# SPDX-License-Identifier: Apache-2.0
"""One pass over a row of logits: its loss, and the loss's gradient in the logits' place."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squash(z, cap, CAPPED: tl.constexpr):
    """`cap tanh(z / cap)`, by an exponential that cannot overflow."""
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(z) / cap)
        t = (1.0 - e) / (1.0 + e)
        z = cap * tl.where(z < 0, -t, t)
    return z


@triton.jit
def loss_and_gradient(logits, stride, targets, losses, width, cap, ignored, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row: the largest logit and the sum of exponentials as it goes, then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == ignored:
        tl.store(losses + row, 0.0)
        for start in range(0, width, BLOCK):
            tl.store(at + start + columns, tl.zeros([BLOCK], at.dtype.element_ty), mask=start + columns < width)
        return
    largest = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        z = tl.load(at + start + columns, mask=start + columns < width, other=float("-inf")).to(tl.float32)
        z = tl.where(start + columns < width, squash(z, cap, CAPPED), float("-inf"))
        now = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(z - now), 0)
        largest = now
    norm = largest + tl.log(total)
    own = squash(tl.load(at + target).to(tl.float32), cap, CAPPED)
    tl.store(losses + row, norm - own)
    tl.debug_barrier()  # the target's logit is read by all before anybody writes over it
    for start in range(0, width, BLOCK):
        here = start + columns
        z = squash(tl.load(at + here, mask=here < width, other=0.0).to(tl.float32), cap, CAPPED)
        grad = tl.exp(z - norm) - tl.where(here == target, 1.0, 0.0)
        if CAPPED:
            grad *= 1.0 - (z / cap) * (z / cap)
        tl.store(at + here, grad.to(at.dtype.element_ty), mask=here < width)
