# SPDX-License-Identifier: Apache-2.0
"""What the layers of a model ask one after another in a call, answered for all of them at the first question: for those that
asked in the call before. The host then asks a device for one thing, where it would for one a layer.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights.whole import at_hand
from .kernel import stream_of
from .lasting import version_of

Question = tuple[tuple[Tensor, ...], float]
"""Tensors on one device, and a number that goes with them."""
Answer = Callable[[Sequence[Question]], Sequence[Tensor]]
"""What answers questions about tensors on one device: a tensor each."""
Key = tuple[int, ...]
"""The ids of a question's tensors."""


class Questions(dict[Key, tuple[Answer, "list[weakref.ref[Tensor]]", float]]):
    """The questions of one call. They keep no tensor alive, and are unknown to copies of the model."""

    def again(self, answer: Answer, device: torch.device) -> list[Question]:
        """Those that may be asked now."""
        found: list[Question] = []
        for own, refs, number in self.values():
            tensors = tuple(t for ref in refs if (t := ref()) is not None and at_hand(t, device))
            if own is answer and len(tensors) == len(refs):
                found.append((tensors, number))
        return found

    def __reduce__(self) -> tuple[type[Questions], tuple[()]]:
        return Questions, ()


class Found(NamedTuple):
    """A question, which versions its tensors had, and the answer."""

    question: Question
    versions: list[int]
    answer: Tensor

    def fits(self, tensors: tuple[Tensor, ...], number: float) -> bool:
        """Whether it was asked of these very tensors as they are now."""
        same = all(map(operator.is_, tensors, self.question[0])) and number == self.question[1]
        return same and self.versions == list(map(version_of, tensors))


class Answers:
    """The answers of one call."""

    def __init__(self, before: Questions) -> None:
        self.asked = Questions()
        self._before = before
        self._found: dict[Any, dict[Key, Found]] = {}

    def of(self, answer: Answer, tensors: tuple[Tensor, ...], number: float) -> Tensor | None:
        """What is answered; None where the question was not foreseen."""
        key, device = tuple(map(id, tensors)), tensors[0].device
        self.asked[key] = answer, list(map(weakref.ref, tensors)), number
        place = answer, device, stream_of(device)
        if place not in self._found:
            self._found[place] = self._answered(answer, device)
        found = self._found[place].get(key)
        return found.answer if found is not None and found.fits(tensors, number) else None

    def _answered(self, answer: Answer, device: torch.device) -> dict[Key, Found]:
        questions = self._before.again(answer, device)
        every = zip(questions, answer(questions) if questions else (), strict=True)
        return {tuple(map(id, q[0])): Found(q, list(map(version_of, q[0])), made) for q, made in every}
