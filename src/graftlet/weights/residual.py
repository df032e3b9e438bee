# SPDX-License-Identifier: Apache-2.0
"""A tensor's very bits, kept in less than a byte an element beside an estimate of it.

Floating-point numbers of one sign are ordered as their bit patterns are. The lowest seven bits of a pattern tell it among
the 128 nearest ones, so they are all that is kept of a number whose estimate is off by less than 32 units in the last
place. The few others are kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 7
WINDOW = 1 << BITS
TRUSTED = WINDOW // 4
"""How far an estimate may be off when the bits are taken: it may be found a little otherwise when they are put back."""

STEP = 1 << 16
"""How many elements are worked on at a time: all passes over them find them in the processor's cache."""
ROW = 64
"""Elements that are looked at together for one that is far off: few are."""

_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Residual:
    """What is needed beside an estimate. low: the lowest bits, packed step by step. places, values: what is kept whole,
    and where. sum: of all patterns, to know the tensor by.
    """

    low: Tensor
    places: Tensor
    values: Tensor
    dtype: torch.dtype
    sum: Tensor
    step: int

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.places.nbytes + self.values.nbytes

    def restored(self, estimate: Tensor) -> Tensor | None:
        """The tensor, from an estimate in its own dtype; None where the estimate is not good enough."""
        if estimate.dtype != self.dtype:
            return None
        given, low = _words(estimate), self.low.to(estimate.device)
        found = torch.empty_like(given)
        parts = found.split(self.step), given.split(self.step), _parts(low, self.step)
        for words, near, packed in zip(*parts, strict=True):
            near = _ordered(near)
            off = _unpacked(packed, len(near)).to(near.dtype).sub_(near).bitwise_and_(WINDOW - 1)
            words.copy_(_ordered(off.add_(near).sub_(WINDOW // 2)))
        found[self.places.to(found.device).long()] = _words(self.values.to(found.device))
        same = _sum(found) == self.sum.to(found.device)
        return found.view(self.dtype).reshape(estimate.shape) if bool(same) else None


def residual(tensor: Tensor, estimate: Tensor) -> Residual | None:
    """What brings `tensor` back from an estimate of its dtype; None where that dtype is none of the three usual ones."""
    if tensor.dtype not in _WORDS or estimate.shape != tensor.shape:
        return None
    own, near = _words(tensor), _words(estimate)
    step = STEP if own.device.type == "cpu" else max(STEP, len(own) + -len(own) % 8)
    low, places = own.new_empty(_packed_size(len(own)), dtype=torch.uint8), []
    for number, (a, b, to) in enumerate(zip(own.split(step), near.split(step), _parts(low, step), strict=True)):
        a = _ordered(a)
        places.append(_far(a - _ordered(b)) + number * step)
        _pack(a.add_(WINDOW // 2).bitwise_and_(WINDOW - 1).to(torch.uint8), to)
    where = torch.cat(places) if places else own.new_empty(0, dtype=torch.int64)
    small = where.to(torch.int32) if own.numel() < 2**31 else where
    return Residual(low, small, own[where].view(tensor.dtype), tensor.dtype, _sum(own), step)


def _far(off: Tensor) -> Tensor:
    """The places of all differences but -TRUSTED to TRUSTED - 1."""
    size = off.bitwise_xor_(off >> (torch.iinfo(off.dtype).bits - 1))
    if len(size) % ROW or not len(size):
        return (size >= TRUSTED).nonzero().flatten()
    rows = size.view(-1, ROW)
    some = (rows.amax(1) >= TRUSTED).nonzero().flatten()
    row, column = (rows[some] >= TRUSTED).nonzero(as_tuple=True)
    return some[row] * ROW + column


def _sum(words: Tensor) -> Tensor:
    whole = words.view(torch.int64) if words.nbytes % 8 == 0 else words  # fewer numbers to add
    return whole.sum(dtype=torch.int64)


def _words(tensor: Tensor) -> Tensor:
    """Bit patterns as integers, `[n]`."""
    return tensor.detach().contiguous().view(_WORDS[tensor.dtype]).flatten()


def _ordered(words: Tensor) -> Tensor:
    """Bit patterns turned so that they have the numbers' order, -0 just below 0; once more turns them back.

    They wrap around at both ends, as do the differences of them, so that no wider integers are needed.
    """
    kind = torch.iinfo(words.dtype)
    return (words >> (kind.bits - 1)).bitwise_and_(kind.max).bitwise_xor_(words)


def _packed_size(count: int) -> int:
    return (count + -count % 8) // 8 * BITS


def _parts(packed: Tensor, step: int) -> tuple[Tensor, ...]:
    """What is packed, step by step."""
    return packed.split(step // 8 * BITS) if len(packed) else ()


def _pack(low: Tensor, to: Tensor) -> None:
    """Eight parts of seven-bit numbers in the place of seven: the last one's bits are the others' eighth bits."""
    parts = torch.nn.functional.pad(low, (0, -len(low) % 8)).reshape(8, -1)
    bits = torch.arange(BITS, dtype=torch.uint8, device=low.device)[:, None]
    torch.bitwise_or(((parts[7] >> bits) & 1) << BITS, parts[:7], out=to.view(BITS, -1))


def _unpacked(packed: Tensor, count: int) -> Tensor:
    parts = packed.view(BITS, -1)
    bits = torch.arange(BITS, dtype=torch.uint8, device=packed.device)[:, None]
    last = ((parts >> BITS) << bits).sum(0, dtype=torch.uint8)
    return torch.cat([parts & (WINDOW - 1), last[None]]).flatten()[:count]
