# SPDX-License-Identifier: Apache-2.0
"""What a layer makes of its tensors again and again, kept from call to call while they are the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .kernel import capturing

T = TypeVar("T")

Guard = tuple["dict[str, Any]", str, Any]
"""A dictionary, a key, and what stood there."""


class Held(Generic[T]):
    """A thing, and what it was made from: for whom, where that stood, and which version the tensors among it had.

    Asked by every layer in every call, so no loop of it is Python's own, and a dictionary is compared as one where most of
    it counts. Not where it holds tensors, which are not compared by what they are.
    """

    def __init__(self, key: tuple[Any, ...], guards: list[Guard], made: T, read: bool) -> None:
        self.key, self.made = key, made
        asked: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        for place, name, value in guards:
            asked.setdefault(id(place), (place, {}))[1][name] = value
        self.dictionaries: list[dict[str, Any]] = []
        self.places: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.values: list[Any] = []
        for place, own in asked.values():
            if _compared(place, own):
                self.dictionaries.append(place)
            else:
                self.places += [place] * len(own)
                self.names += own.keys()
                self.values += own.values()
        self.copies = list(map(dict, self.dictionaries))
        self.tensors = [value for _, _, value in guards if read and isinstance(value, Tensor)]
        self.marks = self._marks()

    def good(self, key: tuple[Any, ...]) -> bool:
        """Whether all of it is as it was."""
        return (
            key == self.key
            and all(map(operator.eq, self.dictionaries, self.copies))
            and all(map(operator.is_, map(dict.get, self.places, self.names), self.values))
            and self._marks() == self.marks
        )

    def _marks(self) -> tuple[list[int], list[int]]:
        return list(map(version_of, self.tensors)), list(map(Tensor.data_ptr, self.tensors))


def _compared(place: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a dictionary is compared as one for the sake of some of what it holds."""
    return 2 * len(own) > len(place) and not any(isinstance(value, Tensor) for value in place.values())


version_of = operator.attrgetter("_version")


class LastMade(Generic[T]):
    """What a layer made of its tensors last, for as long as all that it was made from is the same.

    It is kept in inference alone. What it was made from is known by place and version, so it does not see what is written
    through a tensor's `.data`. A copy of a layer starts without. One that a CUDA graph reads is kept until the layer's
    adapters are others, as the graph itself keeps no memory that was there before it.
    """

    read: ClassVar[bool] = True
    """Whether it depends on what stands in the tensors."""

    def __init__(self) -> None:
        self._held: Held[T] | None = None
        self._read: dict[int, T] = {}

    def clear(self) -> None:
        """Forget it."""
        self._held, self._read = None, {}

    def get(
        self,
        key: tuple[Any, ...],
        device: torch.device,
        guards: Callable[[], list[Guard] | None],
        make: Callable[[], T],
    ) -> T:
        """What is at hand, or a new one; it is kept where guards can be set over what it is made from."""
        if (self.read and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return make()
        if self._held is not None and self._held.good(key):
            if self.read and capturing(device):
                self._read[id(self._held.made)] = self._held.made
            return self._held.made
        self._held, made, over = None, make(), guards()
        if over is not None and not any(isinstance(v, Tensor) and (v.is_inference() or v.is_meta) for _, _, v in over):
            if self.read and device.type == "cuda" and not capturing(device):
                torch.cuda.current_stream(device).synchronize()  # other threads may read it on streams of their own
            self._held = Held(key, over, made, self.read)
        return made

    def __deepcopy__(self, memo: Any) -> LastMade[T]:
        return type(self)()

    def __reduce__(self) -> tuple[type[LastMade[T]], tuple[()]]:
        return type(self), ()


class LastFound(LastMade[T]):
    """What a layer found out of which tensors it has, whatever stands in them: good in training too."""

    read = False


def steps(place: Any, *path: str) -> list[Guard] | None:
    """The way from a module to what it holds, a guard a step; None where it holds that in no dictionary of its own."""
    found: list[Guard] = []
    for name in path:
        within = (d for d in (place._parameters, place._modules, place._buffers) if name in d)
        if (where := next(within, None)) is None:
            return None
        found.append((where, name, where[name]))
        place = where[name]
    return found
