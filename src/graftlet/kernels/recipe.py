# SPDX-License-Identifier: Apache-2.0
"""Tensors that are cheaper to make again than to keep, and ways back that are cheaper to take together.

A tensor remembers how it was made, for whoever would save it for backward; and where somebody wants to know, a layer's
output remembers what its way back will ask for, for whoever makes its gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..core.kernel import fast_outer

RECIPE = "_graftlet_recipe"
THIN = "_graftlet_thin"


class Ahead:
    """Where a layer's way back finds what another one made ahead of it, as it made the gradient of the layer's output."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, int, Tensor] | None = None

    def give(self, dy: Tensor, dB: Tensor) -> None:
        """Leave what was made of the gradient `dy`."""
        self._given = dy.detach(), dy._version, dB  # by its own graph it would hold itself

    def take(self, dy: Tensor) -> Tensor | None:
        """`dB`, where this is the very gradient that it was made of; nothing is left."""
        given, self._given = self._given, None
        if given is None or given[0].data_ptr() != dy.data_ptr() or given[1] != dy._version:
            return None
        return given[2]


class Thin(NamedTuple):
    """An output has the summand `s h B^T`, h `[n, r]`: of its gradient dy, the way back will ask for `dB = s dy^T h`."""

    h: Tensor
    scale: float


class Pulled(NamedTuple):
    """What a way back gave: the tensor itself again or, where dh was given, `dh^T` times it; the gradients of its parts; and
    dB of the parts, where it made that too.
    """

    made: Tensor | None
    dA: Tensor | None
    grads: tuple[Tensor, ...]
    dBs: tuple[Tensor | None, ...]


Pull = Callable[[Tensor, "Tensor | None", Sequence["Thin | None"], tuple[Tensor, ...]], Pulled]


@dataclass(frozen=True)
class Recipe:
    """A tensor is `make(*parts)`; the parts are kept by others anyway.

    pull: out of the tensor's gradient `[rows, features]`, `dh [rows, r]`, what is written on the parts and the parts; it may
    write over all that it is given. Who uses it is in the place of the tensor's own way back. outer: `dh^T` times the tensor,
    out of dh, the bits by which entries of the tensor are dropped (or None), and the parts; None where making it is as good.
    """

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    pull: Pull | None = None
    outer: Callable[..., Tensor | None] | None = None


def noted(made: Tensor, make: Callable[..., Tensor], *parts: Tensor, pull: Pull | None = None) -> Tensor:
    """The tensor, with how it was made written on it."""
    setattr(made, RECIPE, Recipe(make, parts, pull))
    return made


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How a tensor was made, where that is known, or is seen by its graph."""
    found: Any = getattr(tensor, RECIPE, None)
    return _product(tensor) if found is None else found


def _product(tensor: Tensor) -> Recipe | None:
    """The recipe of a product of two tensors that its own way back keeps anyway."""
    node: Any = tensor.grad_fn
    if node is None or node.name() != "MulBackward0" or tensor._version or _packed():
        return None
    try:
        parts = node._saved_self, node._saved_other
    except RuntimeError:  # what it keeps was written over since
        return None
    alike = all(type(p) is Tensor and p.shape == tensor.shape and p.dtype == tensor.dtype for p in parts)
    return Recipe(torch.mul, parts, outer=fast_outer) if alike else None


def _packed() -> bool:
    """Whether what is saved for backward is given to somebody, who would be asked for it back: checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]


class _Local(threading.local):
    telling = False


_local = _Local()


@contextmanager
def telling() -> Iterator[None]:
    """Let layers write on their outputs what their ways back will ask for, until the block ends."""
    before, _local.telling = _local.telling, True
    try:
        yield
    finally:
        _local.telling = before


def told(y: Tensor, thin: Thin) -> Ahead | None:
    """Write on a layer's output what its way back will ask for; the place to look for that first. None where nobody asks."""
    if not _local.telling:
        return None
    ahead = Ahead()
    setattr(y, THIN, (thin, ahead))
    return ahead


class Folded:
    """The way back of a layer's input that was made, taken together with the layer's own."""

    def __init__(self, recipe: Recipe) -> None:
        self._pull, self._count = recipe.pull, len(recipe.parts)
        found = [getattr(part, THIN, None) for part in recipe.parts]
        self._beside = [one[0].h for one in found if one is not None]
        self._told: list[tuple[float, Ahead] | None] = [one and (one[0].scale, one[1]) for one in found]

    def taken(self) -> list[Tensor]:
        """The tensors that it needs beside the recipe's parts, to be saved for backward; it holds them no longer."""
        beside, self._beside = self._beside, []
        return beside

    def back(self, d: Tensor, dh: Tensor | None, saved: Sequence[Tensor]) -> Pulled:
        """Out of the input's gradient, as `Recipe.pull`; what parts will ask for is left where they look for it."""
        rest = iter(saved[self._count :])
        thins = [None if one is None else Thin(next(rest), one[0]) for one in self._told]
        found = cast(Pull, self._pull)(d, dh, thins, tuple(saved[: self._count]))
        for one, dy, dB in zip(self._told, found.grads, found.dBs, strict=True):
            if one is not None and dB is not None:
                one[1].give(dy, dB)
        return found
