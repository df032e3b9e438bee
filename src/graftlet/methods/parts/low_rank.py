# SPDX-License-Identifier: Apache-2.0
"""Products of thin matrices on any layer."""

from __future__ import annotations

import math

from torch import Tensor

from ...core.algebra import Factors, Thin
from ...core.method import Delta, Stage, View
from ...core.settled import Settled
from ...weights.site import Site


class LowRank(Delta):
    """dW = B A, however the two are made. A subclass gives `factors`."""

    derives = True

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        """A `[r, columns]` and B `[out, r]`."""
        raise NotImplementedError

    def delta(self, p: View) -> Tensor:
        A, B = self.factors(p)
        return shaped(p.site, B @ A)

    def factored(self, p: View) -> Factors | None:
        if p.site.stack or p.site.groups > 1:
            return None  # each matrix of a stack, and each group, has factors of its own
        A, B = self.factors(p)
        return Factors(A[None], B[None])

    def thin(self, p: View) -> Thin | None:
        if not p.site.linear or type(self).update is not LowRank.update or (rate := self.rate(p)) is None:
            return None
        return Thin(*self.factors(p), 1.0, rate)

    def settled(self, p: View, before: Stage) -> Settled | None:
        found = super().settled(p, before)
        small = found is not None and KEPT * (found.A.numel() + found.B.numel()) <= p.site.shape.numel()
        return found if small else None

    def update(self, p: View, x: Tensor) -> Tensor:
        return through(p.site, x, *self.factors(p))


KEPT = 16
"""Factors are kept in inference where they take at most this part of the weight's memory: what layers share stays shared."""


def through(site: Site, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The site's operation with the weight B A, of B `[out, r]` and A `[r, columns]`.

    Each group of a convolution has its own inputs, which A cannot tell apart: there the product is made.
    """
    if site.groups > 1:
        return site.op(x, (B @ A).reshape(site.shape))
    return site.mix(site.op(x, A.unflatten(1, (-1, *site.kernel))), B)


def shaped(site: Site, matrix: Tensor) -> Tensor:
    """A matrix `[out, columns]` in the shape of a site's weight (of one expert's, in a stack)."""
    return matrix.reshape(site.shape[1:] if site.stack else site.shape)


def kaiming(factor: Tensor, stack: int = 0, inputs: int | None = None) -> Tensor:
    """A factor filled evenly up to 1 / sqrt(inputs), as a new linear layer's weight is.

    inputs: of one output; all dimensions but the first (of one expert's) unless given.
    """
    return factor.uniform_(-1, 1).div_(math.sqrt(inputs or math.prod(factor.shape[2 if stack else 1 :])))
