# SPDX-License-Identifier: Apache-2.0
"""What adapters add to rows of one token each, every row its own adapter's: two passes that read each thin matrix once.

x is `[n, k]`, A `[adapters, r, k]`, B `[adapters, m, r]`, y `[n, m]`, written over; owner `[n]` is the adapter of each row.

Where a kernel may start before the one ahead of it has ended (from compute capability 9.0 on), the second pass reads its
thin matrix while it waits for the first.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN, WIDE = 256, 64
"""Columns of A that a program sums over, and rows of B that one writes, at ranks up to 16: above, tiles of the same area."""


def shrunk(x: Tensor, A: Tensor, owner: Tensor) -> Tensor:
    """`A x` of each row's adapter, in parts `[n, parts, R]` that are still to be summed."""
    (n, k), r = x.shape, A.shape[1]
    parts, R = triton.cdiv(k, SPAN), max(2, triton.next_power_of_2(r))
    step, early = min(SPAN, 16 * SPAN // R), _early(x.device)
    h = torch.empty(n, parts, R, dtype=torch.float32, device=x.device)
    sizes = (k, r, x.stride(0), parts)
    _shrink[(n, parts)](x, A, h, owner, *sizes, R, SPAN, step, early, num_warps=4, **_launched(early))
    return h


def expand(y: Tensor, start: Tensor | None, h: Tensor, B: Tensor, owner: Tensor) -> None:
    """Put `start + B h` of each row's adapter into y; None: `B h`. start: y itself, or `[n, m]`."""
    (n, parts, R), (_, m, r) = h.shape, B.shape
    wide, early, held = min(WIDE, 16 * WIDE // R), _early(y.device), start is not None
    start = y if start is None else start
    sizes = (m, r, y.stride(0), start.stride(0), parts, triton.next_power_of_2(parts))
    grid = (n, triton.cdiv(m, wide))
    _expand[grid](y, start, h, B, owner, *sizes, R, wide, held, early, num_warps=1, **_launched(early))


@functools.cache
def _early(device: torch.device) -> bool:
    """Whether kernels may start before the one ahead of them has ended."""
    known = hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")
    return known and torch.cuda.get_device_capability(device) >= (9, 0)


def _launched(early: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if early else {}


@triton.jit
def _shrink(
    x, A, h, owner, k, r, stride, parts, R: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr
):
    row, part = tl.program_id(0), tl.program_id(1)
    ranks = tl.arange(0, R)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    A += tl.load(owner + row).to(tl.int64) * r * k
    sums = tl.zeros([R], tl.float32)
    for start in tl.static_range(0, SPAN, STEP):
        columns = part * SPAN + start + tl.arange(0, STEP)
        inside = (ranks[:, None] < r) & (columns[None, :] < k)
        thin = tl.load(A + ranks[:, None] * k + columns[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        wide = tl.load(x + row.to(tl.int64) * stride + columns, mask=columns < k, other=0.0)
        sums += tl.sum(thin.to(tl.float32) * wide.to(tl.float32)[None, :], axis=1)
    tl.store(h + (row * parts + part) * R + ranks, sums)


@triton.jit
def _expand(
    y, start, h, B, owner, m, r, stride, started, parts, PARTS: tl.constexpr,
    R: tl.constexpr, WIDE: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ranks, pieces = tl.arange(0, R), tl.arange(0, PARTS)
    rows = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    B += tl.load(owner + row).to(tl.int64) * m * r
    inside = (rows[:, None] < m) & (ranks[None, :] < r)
    thin = tl.load(B + rows[:, None] * r + ranks[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    if EARLY:
        tl.extra.cuda.gdc_wait()  # for h; all else was there before the kernel that makes it began
    summands = h + (row * parts + pieces[:, None]) * R + ranks[None, :]
    sums = tl.sum(tl.load(summands, mask=pieces[:, None] < parts, other=0.0), axis=0)
    found = tl.sum(thin.to(tl.float32) * sums[None, :], axis=1)
    if HELD:
        found += tl.load(start + row.to(tl.int64) * started + rows, mask=rows < m, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * stride + rows, found.to(y.dtype.element_ty), mask=rows < m)
