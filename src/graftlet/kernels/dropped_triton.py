# SPDX-License-Identifier: Apache-2.0
"""Thin products with dropout on the wide side: what is dropped is known by a bit an entry, and no dropped copy is made.

x is `[n, k]`, A `[r, k]`, the bits `[n, k / 8]`: bit j of byte c stands for column `j k / 8 + c`, so that columns side by
side find theirs in bytes side by side. Every kernel reads its wide tensor once.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropped_shapes import PARTS, rows_cut

WORD = 8
LARGEST = 256
"""The largest rank that the tiles are made for."""


def bits(x: Tensor, rate: float) -> Tensor:
    """Random bits for the entries of `x [n, k]`, each 1 with probability 1 - rate; of torch's own generator's making."""
    n, k = x.shape
    words = torch.empty(n, k // WORD, dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**31, (1,), device=x.device)
    _bits[(triton.cdiv(words.numel(), 1024),)](words, seed, words.numel(), round(rate * 65536), 1024)
    return words


def shrunk(x: Tensor, words: Tensor, A: Tensor) -> Tensor:
    """`(x * kept) A^T`, `[n, r]`."""
    (n, k), r = x.shape, A.shape[0]
    rows, parts, span = triton.cdiv(n, 16), *_cut(k, 128, PARTS)
    h = torch.empty(parts, n, r, dtype=torch.float32, device=x.device)
    _shrink[(rows, parts)](x, words, A, h, n, k, r, x.stride(0), span, _wide(r), 16, 128, num_warps=2, num_stages=3)
    return h.sum(0).to(x.dtype)


def outer(dh: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """`dh^T (x * kept)`, `[r, k]`, in single precision."""
    (n, k), r = x.shape, dh.shape[1]
    columns, parts, span = triton.cdiv(k, 128), *_cut(n, 16, rows_cut(k, r))
    out = torch.empty(parts, r, k, dtype=torch.float32, device=x.device)
    _outer[(columns, parts)](
        dh, x, words, out, n, k, r, x.stride(0), span, _wide(r), 16, 128, num_warps=4, num_stages=3
    )
    return out.sum(0)


def spread(dh: Tensor, A: Tensor, words: Tensor, into: Tensor | None) -> Tensor:
    """`(dh A) * kept`, `[n, k]`; added to a tensor where one is given."""
    (n, r), k = dh.shape, A.shape[1]
    out = torch.empty(n, k, dtype=dh.dtype, device=dh.device) if into is None else into
    grid = (triton.cdiv(n, 32), triton.cdiv(k, 128))
    _spread[grid](dh, A, words, out, n, k, r, into is not None, _wide(r), 32, 128, num_warps=4)
    return out


def _cut(length: int, step: int, parts: int) -> tuple[int, int]:
    """Into how many parts a sum is cut, so that all processors have something to do, and the length of a part."""
    span = triton.cdiv(triton.cdiv(length, parts), step) * step
    return triton.cdiv(length, span), span


def _wide(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


@triton.jit
def _bits(words, seed, count, least, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(tl.load(seed), at, 7)
    word = _two(a, least) | (_two(b, least) << 2) | (_two(c, least) << 4) | (_two(d, least) << 6)
    tl.store(words + at, word.to(tl.uint8), mask=at < count)


@triton.jit
def _two(random, least):
    """Two bits out of a random word, one from each half."""
    random = random.to(tl.uint32)
    return ((random & 0xFFFF) >= least).to(tl.int32) | (((random >> 16) >= least).to(tl.int32) << 1)


@triton.jit
def kept(words, rows, columns, k, inside):
    """Which entries of a tile are kept."""
    eighth = k // 8
    word = tl.load(words + rows[:, None] * eighth + (columns % eighth)[None, :], mask=inside, other=0)
    return ((word >> (columns // eighth)[None, :].to(tl.uint8)) & 1) != 0


@triton.jit
def seen(x, words, rows, columns, n, k, stride):
    """A tile of the wide tensor, zero where an entry is dropped or outside."""
    inside = (rows[:, None] < n) & (columns[None, :] < k)
    tile = tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)
    return tl.where(kept(words, rows, columns, k, inside), tile, 0.0)


@triton.jit
def _shrink(x, words, A, h, n, k, r, stride, span, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, R)
    sums = tl.zeros([ROWS, R], tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, k), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        tile = seen(x, words, rows, columns, n, k, stride)
        thin = tl.load(
            A + ranks[None, :] * k + columns[:, None], mask=(ranks[None, :] < r) & (columns[:, None] < k), other=0.0
        )
        sums += tl.dot(tile, thin.to(tile.dtype))
    at = h + tl.program_id(1).to(tl.int64) * n * r + rows[:, None] * r + ranks[None, :]
    tl.store(at, sums, mask=(rows[:, None] < n) & (ranks[None, :] < r))


@triton.jit
def _outer(dh, x, words, out, n, k, r, stride, span, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    sums = tl.zeros([R, COLUMNS], tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = seen(x, words, rows, columns, n, k, stride)
        thin = tl.load(
            dh + rows[None, :] * r + ranks[:, None], mask=(rows[None, :] < n) & (ranks[:, None] < r), other=0.0
        )
        sums += tl.dot(thin, tile)
    at = out + tl.program_id(1).to(tl.int64) * r * k + ranks[:, None] * k + columns[None, :]
    tl.store(at, sums, mask=(ranks[:, None] < r) & (columns[None, :] < k))


@triton.jit
def _spread(dh, A, words, out, n, k, r, ADD: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    inside = (rows[:, None] < n) & (columns[None, :] < k)
    left = tl.load(dh + rows[:, None] * r + ranks[None, :], mask=(rows[:, None] < n) & (ranks[None, :] < r), other=0.0)
    right = tl.load(
        A + ranks[:, None] * k + columns[None, :], mask=(ranks[:, None] < r) & (columns[None, :] < k), other=0.0
    )
    tile = tl.where(kept(words, rows, columns, k, inside), tl.dot(left, right.to(left.dtype)), 0.0)
    at = out + rows[:, None].to(tl.int64) * k + columns[None, :]
    if ADD:
        tile += tl.load(at, mask=inside, other=0.0)
    tl.store(at, tile.to(out.dtype.element_ty), mask=inside)
