# SPDX-License-Identifier: Apache-2.0
"""A tensor's very bits, kept in less than a byte an element beside an estimate of it.

Floating-point numbers of one sign are ordered as their bit patterns are. The lowest seven bits of a pattern tell it among
the 128 nearest ones, so they are all that is kept of a number whose estimate is off by less than 32 units in the last
place. The few others, and those of the other sign, are kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 7
WINDOW = 1 << BITS
TRUSTED = WINDOW // 4
"""How far an estimate may be off when the bits are taken: it may be found a little otherwise when they are put back."""

STEP = 1 << 18
"""How many elements are worked on at a time: few enough for the processor's cache, enough to be worth the calls."""
ROW = 64
"""Elements that are looked at together for one that is far off: few are. They are also packed together."""

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
            off = _unpacked(packed, len(near)).sub_(near.to(torch.uint8)).add_(WINDOW // 2).bitwise_and_(WINDOW - 1)
            torch.add(near, off, out=words).sub_(WINDOW // 2)
        found[self.places.to(found.device).long()] = _words(self.values.to(found.device))
        same = _sum(found) == self.sum.to(found.device)
        return found.view(self.dtype).reshape(estimate.shape) if bool(same) else None


def residual(tensor: Tensor, estimate: Tensor) -> Residual | None:
    """What brings `tensor` back from an estimate of its dtype; None where there is none, as for other dtypes than the usual."""
    if tensor.dtype not in _WORDS or estimate.shape != tensor.shape or not tensor.numel():
        return None
    own, near = _words(tensor), _words(estimate)
    step = STEP if own.device.type == "cpu" else max(STEP, len(own) + -len(own) % ROW)
    low, places = own.new_empty(_packed_size(len(own)), dtype=torch.uint8), []
    for number, (a, b, to) in enumerate(zip(own.split(step), near.split(step), _parts(low, step), strict=True)):
        places.append(_far(a - b) + number * step)
        _pack(a.to(torch.uint8), to)
    where = torch.cat(places) if places else own.new_empty(0, dtype=torch.int64)
    small = where.to(torch.int32) if own.numel() < 2**31 else where
    return Residual(low, small, own[where].view(tensor.dtype), tensor.dtype, _sum(own), step)


def _far(off: Tensor) -> Tensor:
    """The places of all differences but -TRUSTED to TRUSTED - 1. They wrap around, and so does what is made of them."""
    rows = off.view(-1, ROW if len(off) % ROW == 0 else 1)
    some = ((rows.amax(1) >= TRUSTED) | (rows.amin(1) < -TRUSTED)).nonzero().flatten()
    row, column = ((rows[some] >= TRUSTED) | (rows[some] < -TRUSTED)).nonzero(as_tuple=True)
    return some[row] * rows.shape[1] + column


def _sum(words: Tensor) -> Tensor:
    whole = words.view(torch.int64) if words.nbytes % 8 == 0 else words  # fewer numbers to add
    return whole.sum(dtype=torch.int64)


def _words(tensor: Tensor) -> Tensor:
    """Bit patterns as integers, `[n]`."""
    return tensor.detach().contiguous().view(_WORDS[tensor.dtype]).flatten()


def _packed_size(count: int) -> int:
    return (count + -count % ROW) // 8 * BITS


def _parts(packed: Tensor, step: int) -> tuple[Tensor, ...]:
    """What is packed, step by step."""
    return packed.split(step // 8 * BITS)


LOW = 0x7F7F_7F7F_7F7F_7F7F
ONES = 0x0101_0101_0101_0101
"""Eight bytes are worked on as one number: their lowest seven bits, and their lowest one."""


def _pack(low: Tensor, to: Tensor) -> None:
    """Eight rows of seven-bit numbers in the place of seven: the last one's bits are the others' eighth bits."""
    rows = torch.nn.functional.pad(low, (0, -len(low) % ROW)).view(torch.int64).view(8, -1)
    eighth = (rows[7] >> _shifts(low.device)).bitwise_and_(ONES)
    torch.bitwise_and(rows[:BITS], LOW, out=to.view(torch.int64).view(BITS, -1)).bitwise_or_(eighth << BITS)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    rows = packed.view(torch.int64).view(BITS, -1)
    last = ((rows >> BITS).bitwise_and_(ONES) << _shifts(packed.device)).sum(0, keepdim=True)
    return torch.cat([rows & LOW, last]).view(torch.uint8).flatten()[:count]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS, device=device)[:, None]
