# SPDX-License-Identifier: Apache-2.0
"""One adapter alone, of two thin products, with what there is to find out about it and its layer found out once.

In eager decoding a layer's time is the host's, and in the first layers of a training step too. In inference: the linear
layer's own output, and into it products with tensors that are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..weights.product import Product
from .algebra import Thin
from .kernel import fast_thin

Lean = Callable[[Tensor], "Tensor | None"]
"""A layer's output of its input; None where a kernel declines."""


def lean(thin: Thin | None, product: Product | None, casts: bool) -> Lean | None:
    """A product with two thin ones added, in training. None where some of it is made from parameters, and not one itself."""
    if thin is None or product is None or not as_held(thin.A, thin.B, product.W, product.b):
        return None
    return lambda x: fast_thin(x, thin, product, casts)


def as_held(*tensors: Any) -> bool:
    """Whether these are parameters as they stand, not made from such."""
    return all(type(t) is nn.Parameter or not isinstance(t, Tensor) for t in tensors)


@dataclass(frozen=True)
class Settled:
    """An adapter that makes `(y + scale (x A) B) gain + (b - b gain)` of a linear layer's output `y = x W^T + b`.

    A: `[in, r]`. B: `[r, out]`; the adapter's own tensors, unless its method `derives` such, until it is made `ready`. gain:
    `[out]`, or None. shift: `b - b gain`, or None where that is nothing. product: what the layer is, where that is known.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    gain: Tensor | None = None
    shift: Tensor | None = None
    product: Product | None = None

    def ready(self, dtype: torch.dtype) -> Settled:
        """The same with tensors of its own, for inputs of a dtype."""
        B = self.B if self.gain is None else self.B * self.gain
        return replace(self, A=self.A.to(dtype), B=B.to(dtype))

    def on(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The output with the adapter for the layer's input `x [..., in]`. base: calls the layer."""
        if self.gain is None and self.product is not None and x.numel() >= WIDE:
            y = fast_thin(x, Thin(self.A.t(), self.B.t(), self.scale), self.product, True)
            if y is not None:
                return y
        y = base(x)
        if self.gain is not None:
            y.mul_(self.gain)
        if self.shift is not None:
            y.add_(self.shift)
        h = x.reshape(-1, x.shape[-1]) @ self.A.to(x.dtype)
        y.view(-1, y.shape[-1]).addmm_(h, self.B.to(x.dtype), alpha=self.scale)
        return y


WIDE = 1 << 22
"""From how many numbers of the input on the device's time counts, and the update goes before the product: it is read where
the sum is written, while products are made.
"""
