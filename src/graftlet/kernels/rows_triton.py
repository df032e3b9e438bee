# SPDX-License-Identifier: Apache-2.0
"""What adapters add to rows of one token each, every row its own adapter's: two passes that read each thin matrix once.

x is `[n, k]`, A `[adapters, r, k]`, B `[adapters, m, r]`, y `[n, m]`, written over; owner `[n]` is the adapter of each row.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN, WIDE = 512, 256
"""Columns of A that a program sums over, and rows of B that one writes, at ranks up to 16: above, tiles of the same area."""


def added(y: Tensor, x: Tensor, A: Tensor, B: Tensor, owner: Tensor) -> None:
    """Add `B A x` of each row's adapter to y."""
    (n, k), (r, m) = x.shape, (A.shape[1], B.shape[1])
    parts, R = triton.cdiv(k, SPAN), max(2, triton.next_power_of_2(r))
    step, wide = min(SPAN, 16 * SPAN // R), min(WIDE, 16 * WIDE // R)
    h = torch.empty(n, parts, R, dtype=torch.float32, device=x.device)
    _shrink[(n, parts)](x, A, h, owner, k, r, x.stride(0), parts, R, SPAN, step, num_warps=8)
    grid = (n, triton.cdiv(m, wide))
    _expand[grid](y, h, B, owner, m, r, y.stride(0), parts, triton.next_power_of_2(parts), R, wide, num_warps=4)


@triton.jit
def _shrink(x, A, h, owner, k, r, stride, parts, R: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    ranks = tl.arange(0, R)
    A += tl.load(owner + row).to(tl.int64) * r * k
    sums = tl.zeros([R], tl.float32)
    for start in tl.static_range(0, SPAN, STEP):
        columns = part * SPAN + start + tl.arange(0, STEP)
        wide = tl.load(x + row.to(tl.int64) * stride + columns, mask=columns < k, other=0.0).to(tl.float32)
        inside = (ranks[:, None] < r) & (columns[None, :] < k)
        thin = tl.load(A + ranks[:, None] * k + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(thin * wide[None, :], axis=1)
    tl.store(h + (row * parts + part) * R + ranks, sums)


@triton.jit
def _expand(y, h, B, owner, m, r, stride, parts, PARTS: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    ranks, pieces = tl.arange(0, R), tl.arange(0, PARTS)
    rows = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    B += tl.load(owner + row).to(tl.int64) * m * r
    inside = (rows[:, None] < m) & (ranks[None, :] < r)
    thin = tl.load(B + rows[:, None] * r + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
    summands = h + (row * parts + pieces[:, None]) * R + ranks[None, :]
    sums = tl.sum(tl.load(summands, mask=pieces[:, None] < parts, other=0.0), axis=0)
    at = y + row.to(tl.int64) * stride + rows
    held = tl.load(at, mask=rows < m, other=0.0).to(tl.float32)
    tl.store(at, (held + tl.sum(thin * sums[None, :], axis=1)).to(y.dtype.element_ty), mask=rows < m)
