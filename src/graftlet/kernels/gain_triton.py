# SPDX-License-Identifier: Apache-2.0
"""A gain a channel, in one pass each way, and the norms of the rows of a weight with a low-rank change.

z is `[n, m]`, the gain `[m]`. Sums are in single precision, in an order of their own that is always the same.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64
"""The largest rank that the norms' tiles are made for."""


def gained(z: Tensor, gain: Tensor) -> Tensor:
    """z gain, rounded once."""
    (n, m), y = z.shape, torch.empty_like(z)
    _gained[(triton.cdiv(n, 8), triton.cdiv(m, 512))](z, gain, y, n, m, 8, 512, num_warps=8)
    return y


def regained(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z and, in single precision, of the gain: `dy gain` and the sum of `dy z` over the rows."""
    (n, m), span = z.shape, 128
    parts, dz = triton.cdiv(n, span), torch.empty_like(z)
    sums = torch.empty(parts, m, dtype=torch.float32, device=z.device)
    _regained[(parts, triton.cdiv(m, 256))](dy, z, gain, dz, sums, n, m, span, 16, 256, num_warps=8)
    return dz, sums.sum(0)


def norms(squares: Tensor, across: Tensor, B: Tensor, gram: Tensor, scale: float) -> Tensor:
    """The roots of `squares + 2 s <across, B> + s^2 <B gram, B>`, row by row: across and B are `[m, r]`, gram `[r, r]`."""
    (m, r), found = B.shape, torch.empty_like(squares)
    R = max(16, triton.next_power_of_2(r))
    _norms[(triton.cdiv(m, 32),)](squares, across, B, gram, found, scale, m, r, R, 32, num_warps=4)
    return found


@triton.jit
def _gained(z, gain, y, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < n) & (columns[None, :] < m)
    at = rows[:, None].to(tl.int64) * m + columns[None, :]
    by = tl.load(gain + columns, mask=columns < m, other=0.0).to(tl.float32)
    made = tl.load(z + at, mask=inside, other=0.0).to(tl.float32) * by[None, :]
    tl.store(y + at, made.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _regained(dy, z, gain, dz, sums, n, m, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    by = tl.load(gain + columns, mask=columns < m, other=0.0).to(tl.float32)
    found = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0) * span
    for start in range(first, tl.minimum(first + span, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < n) & (columns[None, :] < m)
        at = rows[:, None].to(tl.int64) * m + columns[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        found += tl.sum(grad * tl.load(z + at, mask=inside, other=0.0).to(tl.float32), axis=0)
        tl.store(dz + at, (grad * by[None, :]).to(dz.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * m + columns, found, mask=columns < m)


@triton.jit
def _norms(squares, across, B, gram, found, scale, m, r, R: tl.constexpr, ROWS: tl.constexpr):
    rows, ranks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    inside = (rows[:, None] < m) & (ranks[None, :] < r)
    at = rows[:, None] * r + ranks[None, :]
    thin = tl.load(B + at, mask=inside, other=0.0).to(tl.float32)
    beside = tl.load(across + at, mask=inside, other=0.0).to(tl.float32)
    square = (ranks[:, None] < r) & (ranks[None, :] < r)
    inner = tl.load(gram + ranks[:, None] * r + ranks[None, :], mask=square, other=0.0)
    turned = tl.dot(thin, inner, input_precision="ieee")
    held = tl.load(squares + rows, mask=rows < m, other=0.0)
    whole = held + tl.sum((2 * scale * beside + scale * scale * turned) * thin, axis=1)
    tl.store(found + rows, tl.sqrt(tl.maximum(whole, 0.0)), mask=rows < m)
