# SPDX-License-Identifier: Apache-2.0
"""What learns in single precision, brought to the dtype that a model computes in: for the time of one call, in one step.

A cast is little work for a device, but there are two a layer, and the host has to ask for each. Factors that were given one
input in the call before stand side by side, so that one product serves all of them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..weights.whole import at_hand, in_parts
from .kernel import stream_of
from .settled import as_held

FIRST = 8
"""So many pairs are cast one by one: then the device is busy with the first layers, and the host has time for the others."""
GRAIN = 64
"""Copies that stand side by side have a multiple of so many entries each, as products like them to begin there."""

Pair = tuple[Tensor, Tensor]
"""The factors of an update, A `[r, in]` and B `[out, r]`."""


class Asked:
    """What a model's last call asked for; kept alive by nobody here, and unknown to copies of the model.

    pairs: those that copies were asked of, by the id of A. met: by the first of them, those that were given one input.
    """

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}
        self.met: dict[int, list[int]] = {}

    def __reduce__(self) -> tuple[type[Asked], tuple[()]]:
        return Asked, ()

    def knows(self, A: Tensor) -> bool:
        """Whether copies of this very tensor were asked for."""
        found = self.pairs.get(id(A))
        return found is not None and found[0]() is A  # ids are given again

    def left(self, done: set[int]) -> list[Pair]:
        """The pairs without some, as they were asked for, but those that met one after another."""
        order = dict.fromkeys(key for first in self.pairs for key in self.met.get(first, [first]))
        pairs = [(A(), B()) for A, B in (self.pairs[key] for key in order if key in self.pairs and key not in done)]
        return [(A, B) for A, B in pairs if A is not None and B is not None]


class Held(NamedTuple):
    """A pair, which versions of it were copied, and the copies."""

    A: Tensor
    B: Tensor
    versions: tuple[int, int]
    copies: Pair

    def fits(self, A: Tensor, B: Tensor) -> bool:
        """Whether they are copies of these very tensors as they are now."""
        return self.A is A and self.B is B and self.versions == (A._version, B._version)


class Beside(NamedTuple):
    """Copies `[r, in]` that stand side by side, how many rows each has, and all of them as one matrix."""

    parts: list[Tensor]
    rows: list[int]
    whole: Tensor


class Copies:
    """The copies of one call: of those pairs that the call before it asked for."""

    def __init__(self, before: Asked) -> None:
        self.asked = Asked()
        self._before = before
        self._made: dict[int, Held] = {}
        self._place: Any = None

    def of(self, A: Tensor, B: Tensor, dtype: torch.dtype) -> Pair:
        """A pair in a dtype; the pair itself where it is of that dtype."""
        if A.dtype == B.dtype == dtype:
            return A, B
        if not as_held(A, B):  # made in this call, so nobody can know them before
            return A.to(dtype), B.to(dtype)
        key, asked = id(A), self.asked.pairs
        asked[key] = weakref.ref(A), weakref.ref(B)
        if len(asked) == FIRST and self._before.knows(A):
            self._make(A, dtype)
        held = self._made.get(key)
        if held is None or not held.fits(A, B) or self._place != _place(A, dtype):
            return A.to(dtype), B.to(dtype)
        return held.copies

    def beside(self, A: Tensor, copy: Tensor) -> Beside | None:
        """A tensor's copy with those that are expected to be given the same input; None where there are none."""
        held = [self._made.get(key) for key in self._before.met.get(id(A), ())]
        parts = [found.copies[0] for found in held if found is not None]
        if not len(parts) == len(held) > 1 or parts[0] is not copy or not all(map(_adjacent, parts, parts[1:])):
            return None
        rows, columns = [part.shape[0] for part in parts], copy.shape[1]
        return Beside(parts, rows, copy.as_strided((sum(rows), columns), (columns, 1)))

    def _make(self, like: Tensor, dtype: torch.dtype) -> None:
        if in_parts(like) or like.is_meta:
            return
        done = self.asked.pairs.keys() - {id(like)}
        pairs = [pair for pair in self._before.left(done) if all(_beside(t, like) for t in pair)]
        every = [A for A, _ in pairs] + [B for _, B in pairs]
        if not every:
            return
        copies = _places(every, dtype)
        torch._foreach_copy_(copies, every)  # pyright: ignore[reportPrivateImportUsage]
        both = zip(copies[: len(pairs)], copies[len(pairs) :], strict=True)
        for (A, B), own in zip(pairs, both, strict=True):
            self._made[id(A)] = Held(A, B, (A._version, B._version), own)
        self._place = _place(like, dtype)


def _places(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Room for copies: in one piece, but for those of odd sizes."""
    even = [t for t in tensors if t.numel() % GRAIN == 0]
    room = torch.empty(sum(t.numel() for t in even), dtype=dtype, device=tensors[0].device)
    places = iter(_unflatten_dense_tensors(room, even) if even else ())
    return [torch.empty_like(t, dtype=dtype) if t.numel() % GRAIN else next(places) for t in tensors]


def _adjacent(one: Tensor, next: Tensor) -> bool:
    """Whether two matrices of one memory are one matrix, the rows of the second below those of the first."""
    return one.shape[1] == next.shape[1] and next.storage_offset() == one.storage_offset() + one.numel()


def _beside(tensor: Tensor, like: Tensor) -> bool:
    return tensor.dtype == like.dtype and at_hand(tensor, like.device)


def _place(tensor: Tensor, dtype: torch.dtype) -> tuple[torch.dtype, torch.device, int]:
    """For which products a copy is good: of which dtype, and on which stream of which device."""
    return dtype, tensor.device, stream_of(tensor.device)
