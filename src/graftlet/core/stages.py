# SPDX-License-Identifier: Apache-2.0
"""The stages that a layer's forward is a chain of: the base layer, and one that each acting adapter makes from that before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..weights.product import Product
from .method import Stage, Weights

if TYPE_CHECKING:
    from .layer import AdaptedLayer


class Base:
    """The first stage: the layer without adapters, or with those that are merged into its weight."""

    def __init__(self, layer: AdaptedLayer, args: tuple = (), kwargs: dict | None = None, pure: bool = False) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs or {}
        self.pure = pure and layer.merged
        self.dtype: torch.dtype | None = None
        self.output: Tensor | None = None
        self._weights: Weights | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.pure:
            W, b = self.layer.original()
            y = self.layer.site.op(x, W, b, *self.args, **self.kwargs)
        else:
            y = self.layer.call_base(x, *self.args, **self.kwargs)
        self.dtype = y.dtype
        return y

    def weight(self) -> Weights:
        if self._weights is None:
            self._weights = widened(*(self.layer.original() if self.pure else self.layer.site.read()))
        return self._weights

    @property
    def pristine(self) -> bool:
        return self.pure or not self.layer.merged

    def bias(self) -> Tensor | None:
        return self.layer.original()[1] if self.pure else self.layer.site.read_bias()

    def origin(self) -> Weights:
        return self.weight() if self.pristine else widened(*self.layer.original())

    def product(self) -> Product | None:
        return None if self.pure or self.args or self.kwargs else self.layer.site.product()


class Rows(Base):
    """The first stage for some rows of a batch: what the base layer gives for the input as it is, is computed once."""

    def __init__(self, whole: Base, batch: Tensor, index: Tensor, rows: Tensor) -> None:
        super().__init__(whole.layer, whole.args, whole.kwargs, pure=True)
        self.whole, self.batch, self.index, self.rows = whole, batch, index, rows

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.rows or self.layer.site.opaque:
            return super().__call__(x)
        if self.whole.output is None:
            self.whole.output = self.whole(self.batch)
        self.dtype = self.whole.dtype
        return self.whole.output.index_select(0, self.index)

    def product(self) -> None:
        return None  # the whole batch's is made once


class Adapted:
    """A stage made by one adapter from the stage before."""

    def __init__(self, layer: AdaptedLayer, name: str, before: Stage) -> None:
        self.layer, self.name, self.before = layer, name, before

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer.methods[self.name].forward(self.layer.view(self.name), x, self.before)

    def weight(self) -> Weights:
        dtype = self.before.weight()[0].dtype
        return self.layer.methods[self.name].adapted(self.layer.view(self.name, dtype), self.before)

    pristine = False

    def bias(self) -> Tensor | None:
        return self.weight()[1]

    def origin(self) -> Weights:
        return self.before.origin()

    def product(self) -> None:
        return None


def widened(W: Tensor, b: Tensor | None) -> Weights:
    """Weights in at least single precision, so that deltas add up before anything is rounded."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.to(dtype), None if b is None else b.to(dtype)
