# SPDX-License-Identifier: Apache-2.0
"""Thin products with dropout on the wide side: what is dropped is known by a bit an entry, and no dropped copy is made.

x is `[n, k]`, A `[r, k]`, the bits `[n, k / 8]`: bit j of byte c stands for column `j k / 8 + c`, so that columns side by
side find theirs in bytes side by side. Every kernel reads its wide tensor once.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.kernel import on_device_of
from .dropped_shapes import PARTS, rows_cut

WORD = 8
STEP = 4
"""How far a draw takes torch's generator on; it goes by fours."""
TOGETHER = 3
"""So many layers with one input are served by one pass."""
LARGEST = 256
"""The largest rank that the tiles are made for."""


def bits(x: Tensor, rate: float, count: int) -> Tensor:
    """Random bits for the entries of `x [n, k]`, each 1 with probability 1 - rate; several times over, `[count, n, k / 8]`.

    They are made by where torch's own generator stands.
    """
    n, k = x.shape
    words = torch.empty(count, n, k // WORD, dtype=torch.uint8, device=x.device)
    drawn, seed, offset = _draw(x.device)
    with on_device_of(x):
        _bits[(triton.cdiv(words.numel(), 1024),)](words, drawn, seed, offset, words.numel(), round(rate * 65536), 1024)
    return words


def _draw(device: torch.device) -> tuple[Tensor | None, int, int]:
    """Where torch's generator stands, which goes on; in a CUDA graph, which draws anew each time, a number that it draws."""
    if torch.cuda.is_current_stream_capturing():
        return torch.randint(2**31, (1,), device=device), 0, 0
    generator = torch.cuda.default_generators[device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + STEP)
    return None, generator.initial_seed(), offset // STEP


def shrunk(x: Tensor, words: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`(x * kept) A^T` for each A and its bits, side by side, `[n, r + ..]`."""
    if len(parts) > TOGETHER:
        some = (slice(i, i + TOGETHER) for i in range(0, len(parts), TOGETHER))
        return torch.cat([shrunk(x, words[s], parts[s]) for s in some], 1)
    (n, k), ranks = x.shape, [A.shape[0] for A in parts]
    rows, cut, span = triton.cdiv(n, 16), *_cut(k, 128, PARTS)
    h = torch.empty(cut, n, sum(ranks), dtype=torch.float32, device=x.device)
    sides = [*zip(parts, ranks, strict=True), *[(None, 0)] * (TOGETHER - len(parts))]
    with on_device_of(x):
        _shrink[(rows, cut)](
            *(x, words, words.stride(0), *(v for side in sides for v in side), h, n, k, sum(ranks), x.stride(0), span),
            *(_wide(max(ranks)), 16, 128),
            num_warps=2,
            num_stages=3,
        )
    return h.sum(0).to(x.dtype)


def outer(dh: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """`dh^T (x * kept)`, `[r, k]`, in single precision."""
    (n, k), r = x.shape, dh.shape[1]
    columns, parts, span = triton.cdiv(k, 128), *_cut(n, 16, rows_cut(k, r))
    out = torch.empty(parts, r, k, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _outer[(columns, parts)](
            dh, x, words, out, n, k, r, x.stride(0), span, _wide(r), 16, 128, num_warps=4, num_stages=3
        )
    return out.sum(0)


def spread(parts: Sequence[tuple[Tensor, Tensor, Tensor]], into: Tensor | None) -> Tensor:
    """The sum of `(dh A) * kept` over parts `(dh, A, words)`, `[n, k]`; added to a tensor where one is given."""
    for some in (parts[i : i + TOGETHER] for i in range(0, len(parts), TOGETHER)):
        (n, _), k = some[0][0].shape, some[0][1].shape[1]
        out = some[0][0].new_empty(n, k) if into is None else into
        grid = (triton.cdiv(n, 32), triton.cdiv(k, 128))
        sides = [(dh, A, words, dh.shape[1]) for dh, A, words in some] + [(None, None, None, 0)] * (
            TOGETHER - len(some)
        )
        widest = _wide(max(r for *_, r in sides))
        with on_device_of(out):
            _spread[grid](
                *(v for side in sides for v in side), out, n, k, into is not None, widest, 32, 128, num_warps=4
            )
        into = out
    assert into is not None
    return into


def _cut(length: int, step: int, parts: int) -> tuple[int, int]:
    """Into how many parts a sum is cut, so that all processors have something to do, and the length of a part."""
    span = triton.cdiv(triton.cdiv(length, parts), step) * step
    return triton.cdiv(length, span), span


def _wide(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


@triton.jit(do_not_specialize=["seed", "offset"])
def _bits(words, drawn, seed, offset, count, least, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if drawn is not None:
        seed = tl.load(drawn)
    a, b, c, d = tl.philox(seed, at, at * 0 + offset, at * 0, at * 0, 7)
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
def _shrink(
    x, words, apart, A1, r1, A2, r2, A3, r3, h, n, k, total, stride, span,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    sums1 = tl.zeros([ROWS, R], tl.float32)
    sums2, sums3 = sums1, sums1
    words2, words3 = words + apart, words + apart + apart
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, k), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < n) & (columns[None, :] < k)
        tile = tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)
        sums1 += _shrunk(tile, words, A1, r1, rows, columns, ranks, k, inside)
        if A2 is not None:
            sums2 += _shrunk(tile, words2, A2, r2, rows, columns, ranks, k, inside)
        if A3 is not None:
            sums3 += _shrunk(tile, words3, A3, r3, rows, columns, ranks, k, inside)
    at = h + tl.program_id(1).to(tl.int64) * n * total + rows[:, None] * total + ranks[None, :]
    within = rows[:, None] < n
    tl.store(at, sums1, mask=within & (ranks[None, :] < r1))
    if A2 is not None:
        tl.store(at + r1, sums2, mask=within & (ranks[None, :] < r2))
    if A3 is not None:
        tl.store(at + r1 + r2, sums3, mask=within & (ranks[None, :] < r3))


@triton.jit
def _shrunk(tile, words, A, r, rows, columns, ranks, k, inside):
    """The product with a tile, of which some is dropped."""
    tile = tl.where(kept(words, rows, columns, k, inside), tile, 0.0)
    thin = tl.load(
        A + ranks[None, :] * k + columns[:, None], mask=(ranks[None, :] < r) & (columns[:, None] < k), other=0.0
    )
    return tl.dot(tile, thin.to(tile.dtype))


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
def _spread(
    dh1, A1, words1, r1, dh2, A2, words2, r2, dh3, A3, words3, r3, out, n, k,
    ADD: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < n) & (columns[None, :] < k)
    tile = _one(dh1, A1, words1, r1, rows, columns, n, k, inside, R)
    if dh2 is not None:
        tile += _one(dh2, A2, words2, r2, rows, columns, n, k, inside, R)
    if dh3 is not None:
        tile += _one(dh3, A3, words3, r3, rows, columns, n, k, inside, R)
    at = out + rows[:, None].to(tl.int64) * k + columns[None, :]
    if ADD:
        tile += tl.load(at, mask=inside, other=0.0)
    tl.store(at, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _one(dh, A, words, r, rows, columns, n, k, inside, R: tl.constexpr):
    """A tile of `(dh A) * kept`."""
    ranks = tl.arange(0, R)
    left = tl.load(dh + rows[:, None] * r + ranks[None, :], mask=(rows[:, None] < n) & (ranks[None, :] < r), other=0.0)
    right = tl.load(
        A + ranks[:, None] * k + columns[None, :], mask=(ranks[:, None] < r) & (columns[None, :] < k), other=0.0
    )
    return tl.where(kept(words, rows, columns, k, inside), tl.dot(left, right.to(left.dtype)), 0.0)
