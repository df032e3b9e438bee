# SPDX-License-Identifier: Apache-2.0
"""Several adapters of a layer as one computation: the rows of a batch, each with its own adapter's factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from .algebra import Factors
from .kernel import HALVES, autocasts, fast_rows, kernels


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

    def lean(self, x: Tensor, y: Tensor) -> bool:
        """Whether the products may be made in the layer's own half precision, and summed into its output as it is."""
        half = x.is_cuda and x.dtype in HALVES and y.dtype == x.dtype
        return half and self.gain is None and not torch.is_grad_enabled() and bool(kernels())

    def added_to(self, y: Tensor, x: Tensor, owner: Tensor) -> Tensor:
        """The output y, which is written over, with what is added for each row by the adapter of its owner's number."""
        A, B, into, out_of = self._narrow(x.dtype)
        count = x.shape[0]
        rows, out = x.reshape(count, -1, x.shape[-1]), y.view(count, -1, y.shape[-1])
        if fast_rows(out, rows, A, B, owner) is None:
            if A.shape[0] < count:  # as many adapters as rows are in the rows' order
                into, out_of = into.index_select(0, owner), out_of.index_select(0, owner)
            out.baddbmm_(torch.bmm(rows, into), out_of)
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
