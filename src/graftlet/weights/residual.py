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

_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Residual:
    """What is needed beside an estimate. low: the lowest bits, packed. places, values: what is kept whole, and where.
    sum: of all patterns, to know the tensor by.
    """

    low: Tensor
    places: Tensor
    values: Tensor
    dtype: torch.dtype
    sum: int

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.places.nbytes + self.values.nbytes

    def restored(self, estimate: Tensor) -> Tensor | None:
        """The tensor, from an estimate in its own dtype; None where the estimate is not good enough."""
        if estimate.dtype != self.dtype:
            return None
        near = _ordered(estimate)
        low = _unpacked(self.low.to(near.device), near.numel()).to(near.dtype)
        found = low.sub_(near).add_(WINDOW // 2).bitwise_and_(WINDOW - 1).sub_(WINDOW // 2).add_(near)
        found[self.places.to(near.device).long()] = _ordered(self.values.to(near.device))
        return _flipped(found).view(self.dtype).reshape(estimate.shape) if _sum(found) == self.sum else None


def residual(tensor: Tensor, estimate: Tensor) -> Residual | None:
    """What brings `tensor` back from an estimate of its dtype; None where that dtype is none of the three usual ones."""
    if tensor.dtype not in _WORDS or estimate.shape != tensor.shape:
        return None
    own = _ordered(tensor)
    off = own - _ordered(estimate)
    places = (off.add_(TRUSTED) >> (BITS - 1)).nonzero().flatten()  # all of them but -TRUSTED to TRUSTED - 1
    small = places.to(torch.int32) if own.numel() < 2**31 else places
    low = _packed((own & (WINDOW - 1)).to(torch.uint8))
    return Residual(low, small, tensor.detach().flatten()[places], tensor.dtype, _sum(own))


def _sum(ordered: Tensor) -> int:
    whole = ordered.view(torch.int64) if ordered.nbytes % 8 == 0 else ordered  # fewer numbers to add
    return int(whole.sum(dtype=torch.int64))


def _ordered(tensor: Tensor) -> Tensor:
    """Bit patterns as integers in the numbers' order, `[n]`; -0 stands just below 0.

    They wrap around at both ends, as do the differences of them, so that no wider integers are needed.
    """
    return _flipped(tensor.detach().contiguous().view(_WORDS[tensor.dtype]).flatten())


def _flipped(words: Tensor) -> Tensor:
    """With the bits below the sign turned over in negative ones; twice is nothing."""
    kind = torch.iinfo(words.dtype)
    return (words >> (kind.bits - 1)).bitwise_and_(kind.max).bitwise_xor_(words)


def _packed(low: Tensor) -> Tensor:
    """Eight parts of seven-bit numbers in the place of seven: the last one's bits are the others' eighth bits."""
    parts = torch.nn.functional.pad(low, (0, -len(low) % 8)).reshape(8, -1)
    bits = torch.arange(BITS, dtype=torch.uint8, device=low.device)[:, None]
    return (((parts[7] >> bits) & 1) << BITS).bitwise_or_(parts[:7])


def _unpacked(packed: Tensor, count: int) -> Tensor:
    bits = torch.arange(BITS, dtype=torch.uint8, device=packed.device)[:, None]
    last = ((packed >> BITS) << bits).sum(0, dtype=torch.uint8)
    return torch.cat([packed & (WINDOW - 1), last[None]]).flatten()[:count]
