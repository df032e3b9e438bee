# SPDX-License-Identifier: Apache-2.0
"""Several adapters of a layer as one computation: the rows of a batch, each with its own adapter's factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..weights.product import Product
from .algebra import Factors
from .kernel import HALVES, autocasts, fast_rows, kernels, transformed


@dataclass(frozen=True)
class Group:
    """Adapters of a layer, by their number in the group.

    A: `[n, r, in]`. B: `[n, out, r]`, with the scale in it. Lower ranks are filled up with zeros. dtype: inputs are brought
    to it; None: they stay as they are. gain: `[n, out]`, by which each multiplies what the layer gives without its bias,
    the change included; None: nothing does.
    """

    A: Tensor
    B: Tensor
    dtype: torch.dtype | None = None
    gain: Tensor | None = None
    narrowed: dict[torch.dtype, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, parts: Sequence[Factors], dtype: torch.dtype | None) -> Group:
        """Factors side by side."""
        r = max(f.A.shape[1] for f in parts)
        A = torch.stack([pad(f.A[0], (0, 0, 0, r - f.A.shape[1])) for f in parts])
        B = torch.stack([pad(f.B[0], (0, r - f.B.shape[2])) * f.scale for f in parts])
        return cls(A, B, dtype)

    def lean(self, x: Tensor) -> bool:
        """Whether the products may be made in an input's own half precision, and summed into the output as it is."""
        half = x.is_cuda and x.dtype in HALVES and self.gain is None
        if not half or torch.is_grad_enabled() or transformed() or not kernels():
            return False
        return not autocasts(x) or torch.get_autocast_dtype(x.device.type) == x.dtype

    def on(
        self, x: Tensor, owner: Tensor, whole: Callable[[Tensor], Tensor], product: Callable[[], Product | None]
    ) -> Tensor:
        """The layer's output for rows `x [n, ..., in]`, with what the adapter of its owner's number adds to each.

        whole: calls the layer without adapters. product: what that is, where it is just a product with its weight.
        """
        A, B, into, out_of = self._narrow(x.dtype)
        count, wide = x.shape[0], x.numel() > x.shape[0] * x.shape[-1]
        rest = fast_rows(x, A, B, owner)
        own = product() if wide or rest is not None else None  # else it is the host's time that counts
        if rest is None:
            if A.shape[0] < count:  # as many adapters as rows are in the rows' order
                into, out_of = into.index_select(0, owner), out_of.index_select(0, owner)
            rest = _spread(torch.bmm(x.reshape(count, -1, x.shape[-1]), into), out_of)
        if own is None or own.dtype != x.dtype or not isinstance(own.W, Tensor):
            y = whole(x)
            rest(_rows(y), _rows(y))
            return y
        y = x.new_empty(*x.shape[:-1], B.shape[1])
        rest(out := _rows(y), None if own.b is None else own.b.expand_as(out))
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), own.W.t())  # the sum is read where it is written
        return y

    def _narrow(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A and B in a dtype, made once, and both transposed."""
        if dtype not in self.narrowed:
            A, B = self.A.to(dtype), self.B.to(dtype)
            self.narrowed[dtype] = A, B, A.mT, B.mT
        return self.narrowed[dtype]

    def added(self, x: Tensor, owner: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        """What is added to the layer's output for rows `x [n, ..., in]`, each by the adapter of its owner's number.

        plain: gives the layer's output for these rows, without its bias.
        """
        if self.dtype is not None and not autocasts(x):
            x = x.to(self.dtype)
        rows = x.reshape(len(x), -1, x.shape[-1])
        y = rows @ self.A.index_select(0, owner).mT @ self.B.index_select(0, owner).mT
        y = y.reshape(*x.shape[:-1], -1)
        if self.gain is None:
            return y
        gain = self.gain.index_select(0, owner).reshape(len(x), *[1] * (x.dim() - 2), -1)
        return plain() * (gain - 1) + y * gain


def _spread(h: Tensor, out_of: Tensor) -> Callable[[Tensor, Tensor | None], None]:
    """The second thin product of rows, to be called with `y [n, tokens, out]`, and what it begins with; None: nothing."""

    def rest(y: Tensor, start: Tensor | None) -> None:
        if start is None:
            torch.bmm(h, out_of, out=y)
        elif y.dtype == h.dtype:
            torch.baddbmm(start, h, out_of, out=y)
        else:  # a layer that gives another dtype than it is given
            torch.add(start, torch.bmm(h, out_of), out=y)

    return rest


def _rows(y: Tensor) -> Tensor:
    """`[n, tokens, features]`, of the very memory."""
    return y.view(y.shape[0], -1, y.shape[-1])
