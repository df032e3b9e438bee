# SPDX-License-Identifier: Apache-2.0
"""What learns in single precision, brought to the dtype that a model computes in: for the time of one call, in one step.

A cast is little work for a device, but there are two a layer, and the host has to ask for each. Factors that were given one
input in the call before stand side by side, so that one product serves all of them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..weights.whole import in_parts

FIRST = 27
"""So many are cast one by one: then the device is busy with the first layers, and the host has time for all the others."""
GRAIN = 64
"""Each copy begins at a multiple of so many entries, as products like it."""


class Asked:
    """What a model's last call asked for; kept alive by nobody here, and unknown to copies of the model.

    tensors: those that copies were asked of. met: by the first of them, those that were given one input.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, weakref.ref[Tensor]] = {}
        self.met: dict[int, list[int]] = {}

    def __reduce__(self) -> tuple[type[Asked], tuple[()]]:
        return Asked, ()

    def knows(self, tensor: Tensor) -> bool:
        """Whether a copy of this very tensor was asked for."""
        found = self.tensors.get(id(tensor))
        return found is not None and found() is tensor  # ids are given again

    def order(self) -> list[int]:
        """The tensors as they were asked for, but those that met one after another."""
        return list(dict.fromkeys(key for first in self.tensors for key in self.met.get(first, [first])))


class Beside(NamedTuple):
    """Copies `[r, in]` that stand side by side, and all of them as one matrix."""

    parts: list[Tensor]
    whole: Tensor


class Copies:
    """The copies of one call: of those tensors that the call before it asked for."""

    def __init__(self, before: Asked) -> None:
        self.asked = Asked()
        self._before = before
        self._made: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._beside: dict[int, Beside] = {}
        self._place: Any = None

    def of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype; the tensor itself where it is of that dtype."""
        if tensor.dtype == dtype:
            return tensor
        key, asked = id(tensor), self.asked.tensors
        asked[key] = weakref.ref(tensor)
        if len(asked) == FIRST and self._before.knows(tensor):
            self._make(tensor, dtype)
        source, version, made = self._made.get(key, (None, 0, tensor))
        fits = source is tensor and version == tensor._version and self._place == _place(tensor, dtype)
        return made if fits else tensor.to(dtype)

    def beside(self, tensor: Tensor, copy: Tensor) -> Beside | None:
        """A tensor's copy with those that are expected to be given the same input; None where there are none."""
        found = self._beside.get(id(tensor))
        return found if found is not None and found.parts[0] is copy else None

    def _make(self, like: Tensor, dtype: torch.dtype) -> None:
        if in_parts(like) or like.is_meta:
            return
        done = self.asked.tensors.keys() - {id(like)}
        known = [self._before.tensors[key]() for key in self._before.order() if key not in done]
        every = [t for t in known if t is not None and _at_hand(t, like)]
        if not every:
            return
        sizes = [-(-t.numel() // GRAIN) * GRAIN for t in every]
        room = torch.empty(sum(sizes), dtype=dtype, device=like.device)
        copies = [
            (part if part.numel() == t.numel() else part[: t.numel()]).view(t.shape)
            for part, t in zip(room.split(sizes), every, strict=True)
        ]
        torch._foreach_copy_(copies, every)  # pyright: ignore[reportPrivateImportUsage]
        self._made = {id(t): (t, t._version, copy) for t, copy in zip(every, copies, strict=True)}
        self._place = _place(like, dtype)
        for first, keys in self._before.met.items():
            parts = [self._made[key][2] for key in keys if key in self._made]
            if len(parts) == len(keys) > 1 and all(map(_adjacent, parts, parts[1:])):
                start, count = parts[0].storage_offset(), sum(part.numel() for part in parts)
                self._beside[first] = Beside(parts, room[start : start + count].view(-1, parts[0].shape[1]))


def _adjacent(one: Tensor, next: Tensor) -> bool:
    """Whether two matrices of one memory are one matrix, the rows of the second below those of the first."""
    return one.shape[1:] == next.shape[1:] and next.storage_offset() == one.storage_offset() + one.numel()


def _at_hand(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor has its numbers here and now; FSDP2 gives a parameter memory only as they come."""
    same = type(tensor) is nn.Parameter and tensor.dtype == like.dtype and tensor.device == like.device
    return same and tensor.data_ptr() != 0


def _place(tensor: Tensor, dtype: torch.dtype) -> tuple[torch.dtype, torch.device, int]:
    """For which products a copy is good: of which dtype, and on which stream of which device."""
    device = tensor.device
    return dtype, device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
