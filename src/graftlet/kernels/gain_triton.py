# SPDX-License-Identifier: Apache-2.0
"""A gain a channel, in one pass each way, and the norms of the rows of a weight with a low-rank change.

z is `[n, m]`, the gain `[m]`. Sums are in single precision, in an order of their own that is always the same.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import struct
from collections.abc import Sequence

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


def norms(asked: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, float]]) -> list[Tensor]:
    """The roots of `|w|^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>`, row by row, for each `(W [m, k], A [r, k], B [m, r], |w|^2 [m],
    s)`: all in one pass, which reads each W once.
    """
    W, A = asked[0][:2]
    counts, ranks = [len(B) for _, _, B, _, _ in asked], [len(A) for _, A, _, _, _ in asked]
    found = torch.empty(sum(counts), dtype=torch.float32, device=W.device).split(counts)
    R = max(16, triton.next_power_of_2(max(ranks)))
    grid = (triton.cdiv(max(counts), ROWS), len(asked))
    table = _table([([*tensors, own], scale) for (*tensors, scale), own in zip(asked, found, strict=True)])
    _norms[grid](table, IN_TRITON[W.dtype], IN_TRITON[A.dtype], R, ROWS, STEP, num_warps=4, num_stages=3)
    return list(found)


ROWS, STEP = 64, 128
"""Of a tile of W."""
IN_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _table(parts: list[tuple[list[Tensor], float]]) -> Tensor:
    """A row each: where the tensors begin, `m, k, r`, and the scale's bits."""
    shapes = [(*tensors[0].shape, len(tensors[1])) for tensors, _ in parts]
    places = [[t.data_ptr() for t in tensors] for tensors, _ in parts]
    rows = [struct.pack("8qd", *at, *shape, scale) for at, shape, (_, scale) in zip(places, shapes, parts, strict=True)]
    table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64)
    return table.pin_memory().to(parts[0][0][0].device, non_blocking=True)  # the device goes on with what it does


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
def _norms(table, WIDE: tl.constexpr, THIN: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    own = table + tl.program_id(1) * 9
    m, k, r = tl.load(own + 5), tl.multiple_of(tl.load(own + 6), 16), tl.load(own + 7)
    rows, ranks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    if tl.program_id(0) * ROWS < m:
        W = tl.multiple_of(tl.load(own).to(tl.pointer_type(WIDE)), 16)
        A = tl.multiple_of(tl.load(own + 1).to(tl.pointer_type(THIN)), 16)
        B = tl.load(own + 2).to(tl.pointer_type(THIN))
        squares, found = (
            tl.load(own + 3).to(tl.pointer_type(tl.float32)),
            tl.load(own + 4).to(tl.pointer_type(tl.float32)),
        )
        scale = tl.load(own + 8).to(tl.float64, bitcast=True).to(tl.float32)
        across, gram = tl.zeros([ROWS, R], tl.float32), tl.zeros([R, R], tl.float32)
        for start in range(0, k, STEP):
            columns = start + tl.arange(0, STEP)
            inside = (rows[:, None] < m) & (columns[None, :] < k)
            w = tl.load(W + rows[:, None] * k + columns[None, :], mask=inside, other=0.0)
            inside = (ranks[:, None] < r) & (columns[None, :] < k)
            a = tl.load(A + ranks[:, None] * k + columns[None, :], mask=inside, other=0.0).to(WIDE)
            across = tl.dot(w, tl.trans(a), across)
            gram = tl.dot(a, tl.trans(a), gram)
        inside = (rows[:, None] < m) & (ranks[None, :] < r)
        b = tl.load(B + rows[:, None] * r + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
        turned = tl.dot(b, gram, input_precision="ieee")
        held = tl.load(squares + rows, mask=rows < m, other=0.0)
        whole = held + tl.sum((2 * scale * across + scale * scale * turned) * b, axis=1)
        tl.store(found + rows, tl.sqrt(tl.maximum(whole, 0.0)), mask=rows < m)
