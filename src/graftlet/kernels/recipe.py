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
    """A tensor is `make(*parts)`; the parts are kept by others anyway."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


def noted(made: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """The tensor, with how it was made written on it."""
    setattr(made, NOTE, Recipe(make, tuple(part.detach() for part in parts)))
    return made


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How a tensor was made, where that is known."""
    found: Any = getattr(tensor, NOTE, None)
    return found
