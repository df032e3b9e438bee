# SPDX-License-Identifier: Apache-2.0
"""Tensors that are cheaper to make again than to keep: each remembers how, for whoever would save it for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NOTE = "_graftlet_recipe"


@dataclass(frozen=True)
class Recipe:
    """A tensor is `make(*parts)`; the parts are kept by others anyway.

    pull: out of the tensor's gradient `[rows, features]` and the parts, the tensor again and the gradients of the parts; it
    may write over all that it is given. Who uses it is in the place of the tensor's own way back.
    """

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    pull: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] | None = None


def noted(made: Tensor, make: Callable[..., Tensor], *parts: Tensor, pull: Callable[..., Any] | None = None) -> Tensor:
    """The tensor, with how it was made written on it."""
    setattr(made, NOTE, Recipe(make, parts, pull))
    return made


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How a tensor was made, where that is known."""
    found: Any = getattr(tensor, NOTE, None)
    return found
