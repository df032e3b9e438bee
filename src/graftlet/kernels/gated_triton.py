# SPDX-License-Identifier: Apache-2.0
"""Backward of a gated product `x = act(a) b` in one pass, in which the product is made again: tensors are written over.

d <- x          b <- d act(a)          a <- d b act'(a)

Where sums over rows are asked for, of tiles that are at hand: `dh^T x` in the place of x, and `s dy^T h` of both gradients dy
of a and b. They are left in parts, for whoever adds them up.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import os
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .dropped_triton import kept
from .recipe import Thin

ROWS, COLUMNS = 32, 128
"""The tile that a program works on at once."""
COMPILED = os.environ.get("TRITON_INTERPRET", "0") != "1"


def pulled(gelu: bool, d: Tensor, a: Tensor, b: Tensor) -> None:
    """The three tensors, contiguous and alike, as above. gelu: the activation is gelu by tanh; else it is silu."""
    _pulled[(triton.cdiv(d.numel(), 1024),)](d, a, b, d.numel(), gelu, 1024, num_warps=4)


def woven(
    gelu: bool, d: Tensor, a: Tensor, b: Tensor, dh: Tensor | None, thins: Sequence[Thin | None], sums: Tensor
) -> None:
    """The same with sums over rows.

    dh: `[n, r]`. sums: `[parts, (r + ..) m]`, for `dh^T x`, and for `s dy^T h` of a and of b, one after another.
    """
    (n, m), parts = d.shape, sums.shape[0]
    span = triton.cdiv(triton.cdiv(n, parts), ROWS) * ROWS
    sides = [
        (h, 0 if h is None else h.shape[1], 0 if h is None else h.stride(0)) for h in (dh, *(t and t.h for t in thins))
    ]
    _woven[(triton.cdiv(m, COLUMNS), parts)](
        *(d, a, b, *sides[0]),
        *(*sides[1], 0.0 if thins[0] is None else float(thins[0].scale)),
        *(*sides[2], 0.0 if thins[1] is None else float(thins[1].scale)),
        *(sums, n, m, sums.shape[1], span, gelu),
        *(triton.next_power_of_2(max(16, *(rank for _, rank, _ in sides))), ROWS, COLUMNS, COMPILED),
        num_warps=8,
    )


def outer(dh: Tensor, words: Tensor | None, a: Tensor, b: Tensor, sums: Tensor) -> None:
    """`dh^T (a b * kept)` for `[n, r]` and `[n, m]`, in parts `[parts, r, m]`; nothing is written over."""
    (n, m), (parts, r, _) = a.shape, sums.shape
    span, R = triton.cdiv(triton.cdiv(n, parts), ROWS) * ROWS, triton.next_power_of_2(max(16, r))
    grid = (triton.cdiv(m, COLUMNS), parts)
    _outer[grid](dh, words, r, dh.stride(0), a, b, sums, n, m, span, R, ROWS, COLUMNS, COMPILED, num_warps=4)


@triton.jit
def _pulled(d, a, b, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x, _da, _db = _gated(d + at, a + at, b + at, inside, GELU)
    tl.store(d + at, x, mask=inside)


@triton.jit
def _gated(d, a, b, inside, GELU: tl.constexpr):
    """The product and both gradients of a tile, of which the gradients are written where they belong."""
    grad = tl.load(d, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(a, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(b, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        s = tl.sigmoid(x)
        slope = s + x * s * (1 - s)
    dtype = a.dtype.element_ty
    made = ((x * s).to(dtype).to(tl.float32) * other).to(dtype)  # rounded as forward does
    da, db = (grad * other * slope).to(dtype), (grad * x * s).to(dtype)
    tl.store(a, da, mask=inside)
    tl.store(b, db, mask=inside)
    return made, da, db


@triton.jit
def _woven(
    d, a, b, dh, r, stride, h1, r1, stride1, s1, h2, r2, stride2, s2, sums, n, m, total, span,
    GELU: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    columns, ranks = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R)
    outer = tl.zeros([R, COLUMNS], tl.float32)
    tall1, tall2 = outer, outer
    first = tl.program_id(1) * span
    for start in tl.range(first, tl.minimum(first + span, n), ROWS, num_stages=3):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < n) & (columns[None, :] < m)
        at = rows[:, None].to(tl.int64) * m + columns[None, :]
        x, da, db = _gated(d + at, a + at, b + at, inside, GELU)
        if dh is None:
            tl.store(d + at, x, mask=inside)
        else:
            outer += tl.dot(_thin(dh, rows, ranks, n, r, stride), _as_made(x, COMPILED))
        if h1 is not None:
            tall1 += tl.dot(_thin(h1, rows, ranks, n, r1, stride1), _as_made(da, COMPILED))
        if h2 is not None:
            tall2 += tl.dot(_thin(h2, rows, ranks, n, r2, stride2), _as_made(db, COMPILED))
    there = sums + tl.program_id(1).to(tl.int64) * total
    within = columns[None, :] < m
    if dh is not None:
        tl.store(there + ranks[:, None] * m + columns[None, :], outer, mask=(ranks[:, None] < r) & within)
    there += r * m
    if h1 is not None:
        tl.store(there + columns[None, :] * r1 + ranks[:, None], tall1 * s1, mask=(ranks[:, None] < r1) & within)
    there += r1 * m
    if h2 is not None:
        tl.store(there + columns[None, :] * r2 + ranks[:, None], tall2 * s2, mask=(ranks[:, None] < r2) & within)


@triton.jit
def _outer(
    dh, words, r, stride, a, b, sums, n, m, span,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    columns, ranks = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R)
    outer = tl.zeros([R, COLUMNS], tl.float32)
    first = tl.program_id(1) * span
    for start in tl.range(first, tl.minimum(first + span, n), ROWS, num_stages=3):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < n) & (columns[None, :] < m)
        at = rows[:, None].to(tl.int64) * m + columns[None, :]
        one = tl.load(a + at, mask=inside, other=0.0)
        x = (one.to(tl.float32) * tl.load(b + at, mask=inside, other=0.0).to(tl.float32)).to(one.dtype)
        if words is not None:
            x = tl.where(kept(words, rows, columns, m, inside), x, 0.0)
        outer += tl.dot(_thin(dh, rows, ranks, n, r, stride), _as_made(x, COMPILED))
    there = sums + tl.program_id(1).to(tl.int64) * r * m + ranks[:, None] * m + columns[None, :]
    tl.store(there, outer, mask=(ranks[:, None] < r) & (columns[None, :] < m))


@triton.jit
def _thin(h, rows, ranks, n, r, stride):
    """Rows of h, transposed: `[R, ROWS]`."""
    return tl.load(
        h + rows[None, :] * stride + ranks[:, None], mask=(rows[None, :] < n) & (ranks[:, None] < r), other=0.0
    )


@triton.jit
def _as_made(tile, COMPILED: tl.constexpr):
    """The tile, of which the compiler knows nothing: it would make it once more, in the order that a product reads it in."""
    if COMPILED:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    return tile
