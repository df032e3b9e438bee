# SPDX-License-Identifier: Apache-2.0
"""Several adapters of a layer as one computation: the rows of a batch, each with its own adapter's factors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .algebra import Factors
from .kernel import kernels


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

    @classmethod
    def of(cls, parts: Sequence[Factors], dtype: torch.dtype | None) -> Group:
        """Factors side by side."""
        r = max(f.A.shape[1] for f in parts)
        A = torch.stack([pad(f.A[0], (0, 0, 0, r - f.A.shape[1])) for f in parts])
        B = torch.stack([pad(f.B[0], (0, r - f.B.shape[2])) * f.scale for f in parts])
        return cls(A, B, dtype)

    def lean(self, x: Tensor, y: Tensor) -> bool:
        """Whether the products may be made in the layer's own half precision, and summed into its output as it is."""
        half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and y.dtype == x.dtype
        return half and self.gain is None and not torch.is_grad_enabled() and bool(kernels())

    def added_to(self, y: Tensor, x: Tensor, owner: Tensor | None) -> Tensor:
        """The output y, which is written over, with what is added for each row; owner None: row i is of adapter i."""
        A, B = self.halved if x.dtype == self.halved[0].dtype else (self.A.to(x.dtype), self.B.to(x.dtype))
        if owner is not None:
            A, B = A.index_select(0, owner), B.index_select(0, owner)
        rows, out = x.reshape(len(x), -1, x.shape[-1]), y.view(len(y), -1, y.shape[-1])
        out.baddbmm_(torch.bmm(rows, A.mT), B.mT)
        return y

    @functools.cached_property
    def halved(self) -> tuple[Tensor, Tensor]:
        """A and B in half precision, made once."""
        kept = self.A.dtype if self.A.dtype.itemsize == 2 else torch.bfloat16
        return self.A.to(kept), self.B.to(kept)

    def added(self, x: Tensor, owner: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        """What is added to the layer's output for rows `x [n, ..., in]`, each by the adapter of its owner's number.

        plain: gives the layer's output for these rows, without its bias.
        """
        if self.dtype is not None and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        rows = x.reshape(len(x), -1, x.shape[-1])
        y = rows @ self.A.index_select(0, owner).mT @ self.B.index_select(0, owner).mT
        y = y.reshape(*x.shape[:-1], -1)
        if self.gain is None:
            return y
        gain = self.gain.index_select(0, owner).reshape(len(x), *[1] * (x.dim() - 2), -1)
        return plain() * (gain - 1) + y * gain
