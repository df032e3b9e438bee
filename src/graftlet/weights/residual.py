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
        found = near + ((low - near + WINDOW // 2) & (WINDOW - 1)) - WINDOW // 2
        found[self.places.to(near.device).long()] = _ordered(self.values.to(near.device))
        return _numbers(found, estimate.dtype).reshape(estimate.shape) if _sum(found) == self.sum else None


def residual(tensor: Tensor, estimate: Tensor) -> Residual | None:
    """What brings `tensor` back from an estimate of its dtype; None where that dtype is none of the three usual ones."""
    if tensor.dtype not in _WORDS or estimate.shape != tensor.shape:
        return None
    own, near = _ordered(tensor), _ordered(estimate)
    places = ((own - near).abs() >= TRUSTED).nonzero().flatten()
    small = places.to(torch.int32) if own.numel() < 2**31 else places
    return Residual(_packed(own & (WINDOW - 1)), small, tensor.detach().flatten()[places], tensor.dtype, _sum(own))


def _sum(ordered: Tensor) -> int:
    return int(ordered.sum(dtype=torch.int64))


def _ordered(tensor: Tensor) -> Tensor:
    """Bit patterns as integers in the numbers' order, `[n]`; -0 stands just below 0."""
    wide = torch.int32 if tensor.dtype.itemsize == 2 else torch.int64
    words = tensor.detach().contiguous().view(_WORDS[tensor.dtype]).flatten()
    magnitude = (words & torch.iinfo(words.dtype).max).to(wide)
    return torch.where(words < 0, -magnitude - 1, magnitude)


def _numbers(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    word = _WORDS[dtype]
    magnitude = torch.where(ordered < 0, -ordered - 1, ordered).to(word)
    return torch.where(ordered < 0, magnitude | torch.iinfo(word).min, magnitude).view(dtype)


def _packed(low: Tensor) -> Tensor:
    """Eight seven-bit numbers in seven bytes."""
    padded = torch.nn.functional.pad(low.to(torch.int64), (0, -len(low) % 8)).reshape(-1, 8)
    word = padded[:, 0].clone()
    for i in range(1, 8):
        word |= padded[:, i] << (BITS * i)
    return word.view(torch.uint8).reshape(-1, 8)[:, :BITS].contiguous()


def _unpacked(packed: Tensor, count: int) -> Tensor:
    word = torch.nn.functional.pad(packed, (0, 1)).contiguous().view(torch.int64)
    return torch.cat([(word >> (BITS * i)) & (WINDOW - 1) for i in range(8)], 1).flatten()[:count]
