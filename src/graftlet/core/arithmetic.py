# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on changes of weights: sums that prune and elect signs, and the nearest change of lower rank.

Task arithmetic (arXiv 2212.04089); TIES (2306.01708); DARE (2311.03099).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .algebra import Factors


@dataclass(frozen=True)
class Rule:
    """How several changes become one. prune: what is done to each first. elect: only the sign of the majority counts."""

    prune: Callable[[Tensor, float], Tensor] | None = None
    elect: bool = False

    def __call__(
        self, changes: Sequence[Tensor], weights: Sequence[float], density: float | None, by: str = "total"
    ) -> Tensor:
        """The weighted sum; with an election, the mean over those that have the elected sign."""
        if self.prune is not None and density is not None and density < 1:
            changes = [self.prune(change, density) for change in changes]
        scaled = [change * weight for change, weight in zip(changes, weights, strict=True)]
        if not self.elect:
            return _total(scaled)
        agreed = elected(changes, by)
        count = _total([a.to(scaled[0].dtype) for a in agreed])
        return _total([s * a for s, a in zip(scaled, agreed, strict=True)]) / count.clamp(min=1)


def trimmed(change: Tensor, density: float) -> Tensor:
    """The largest entries, a share `density` of all; zero elsewhere."""
    kept = change.abs().flatten().topk(int(density * change.numel())).indices
    return torch.zeros_like(change).flatten().index_copy(0, kept, change.flatten()[kept]).reshape(change.shape)


def thinned(change: Tensor, density: float) -> Tensor:
    """Random entries, a share `density` of all, scaled up so that the expectation stays."""
    return change * torch.bernoulli(torch.full_like(change, density)) / density


def elected(changes: Sequence[Tensor], by: str) -> list[Tensor]:
    """Where each change has the sign of the majority: of the sum (`total`), or of the most changes (`frequency`)."""
    votes = _total([c if by == "total" else c.sign() for c in changes])
    sign = torch.where(votes >= 0, 1, -1)
    return [c.sign() == sign for c in changes]


def _total(tensors: Sequence[Tensor]) -> Tensor:
    first, *rest = tensors
    for tensor in rest:
        first = first + tensor
    return first


RULES: dict[str, Rule] = {
    "linear": Rule(),
    "magnitude_prune": Rule(trimmed),
    "ties": Rule(trimmed, elect=True),
    "dare_linear": Rule(thinned),
    "dare_ties": Rule(thinned, elect=True),
}


@dataclass(frozen=True)
class Cut:
    """How much of a change is kept.

    rank: of each matrix; None for all of it. energy: as many singular values as hold this share of their squares' sum.
    clamp: a quantile of the entries of both factors, beyond which they are cut off. driver: of CUDA's decomposition.
    """

    rank: int | None = None
    energy: float | None = None
    clamp: float | None = None
    driver: str | None = None

    def count(self, S: Tensor, size: int) -> int:
        """How many of the singular values `S [cells, n]`, of matrices whose longer side is `size`, are kept."""
        if self.rank is not None:
            return self.rank
        squares = S.double().square()
        if self.energy is None:
            held = S.amax() * torch.finfo(S.dtype).eps * size**0.5 < S
        else:
            left = squares.sum(1, keepdim=True) - squares.cumsum(1) + squares
            held = left > (1 - self.energy) * squares.sum(1, keepdim=True)
        return max(1, int(held.sum(1).max()))


Fitted = tuple[Factors, float]
"""Factors, and how far they are from what they stand for: the Frobenius norm of the difference as a share."""


def of_matrices(change: Tensor, cut: Cut) -> Fitted:
    """The nearest factors of `[cells, out, columns]`."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False, driver=cut.driver if change.is_cuda else None)
    return _cut(U, S, Vh, cut)


def of_products(parts: Sequence[Factors], weights: Sequence[float], cut: Cut) -> Fitted:
    """The nearest factors of a weighted sum of products. No matrix larger than the factors is made.

    The factors stand side by side, B `[cells, out, R]` and A `[cells, R, columns]`.
    """
    whole = stacked(parts, weights)
    return _by_squares(whole, cut) or _by_bases(whole, cut)


def _by_bases(whole: Factors, cut: Cut) -> Fitted:
    """With B = Q1 R1 and A^T = Q2 R2, the product is Q1 (R1 R2^T) Q2^T, whose core alone is decomposed."""
    Q1, R1 = torch.linalg.qr(whole.B)
    Q2, R2 = torch.linalg.qr(whole.A.mT)
    U, S, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False, driver=cut.driver if R1.is_cuda else None)
    return _cut(Q1 @ U, S, Vh @ Q2.mT, cut)


def _by_squares(whole: Factors, cut: Cut) -> Fitted | None:
    """The same for less: with L L^T = B^T B, the product's squared singular values are those of L^T (A A^T) L.

    Squares take half of a double's digits, which leaves what single precision has. None where that is not enough: for
    doubles, for wide factors, and where directions are wanted that are hardly there.
    """
    A, B = whole.A, whole.B
    rank = A.shape[1]
    if A.dtype != torch.float32 or 2 * rank > min(A.shape[2], B.shape[1]):
        return None
    wide_A, wide_B = A.double(), B.double()
    left, right = wide_B.mT @ wide_B, wide_A @ wide_A.mT
    least = left.diagonal(dim1=1, dim2=2).sum(1) * (rank * torch.finfo(left.dtype).eps)
    L, failed = torch.linalg.cholesky_ex(left + torch.diag_embed(least[:, None].expand(-1, rank)))
    squares, U = torch.linalg.eigh(L.mT @ right @ L)
    S, U = squares.clamp(min=0).sqrt().flip(1), U.flip(2)
    kept = min(cut.count(S.to(A.dtype), max(B.shape[1], A.shape[2])), rank)
    if bool(failed.any() | (S[:, kept - 1] <= THERE * S[:, 0]).any()):
        return None
    turned = L @ (U[..., :kept] / S[:, None, :kept])
    made = Factors(turned.mT.to(A.dtype) @ A, B @ (right @ turned).to(B.dtype))
    return _clamped(made, cut), _lost(S, kept)


THERE = 1e-6
"""The share of the largest singular value above which one is found by squares as well as by any other way."""


def stacked(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum of products as one product, of the sum of their ranks."""
    A = [f.A * (weight * f.scale) for f, weight in zip(parts, weights, strict=True)]
    return Factors(torch.cat(A, 1), torch.cat([f.B for f in parts], 2))


def apart(parts: Sequence[Factors], weights: Sequence[float], combine: Callable[..., Tensor]) -> Factors:
    """A's and B's combined each for themselves, each with the root of the weight. Products of unlike ones come with it."""
    if len({f.A.shape for f in parts}) > 1:
        ranks = sorted({f.A.shape[1] for f in parts})
        raise ConfigError(f"A and B of ranks {ranks} cannot be combined apart; use svd, cat or exact.")
    full = [weight * f.scale for f, weight in zip(parts, weights, strict=True)]
    roots = [abs(w) ** 0.5 for w in full]
    signed = [-r if w < 0 else r for r, w in zip(roots, full, strict=True)]
    return Factors(combine([f.A for f in parts], signed), combine([f.B for f in parts], roots))


def _cut(U: Tensor, S: Tensor, Vh: Tensor, cut: Cut) -> Fitted:
    kept = cut.count(S, max(U.shape[1], Vh.shape[2]))
    made = Factors(Vh[:, :kept].contiguous(), (U[..., :kept] * S[:, None, :kept]).contiguous())
    return _clamped(made, cut), _lost(S, kept)


def _clamped(made: Factors, cut: Cut) -> Factors:
    if cut.clamp is None:
        return made
    top = _quantile(torch.cat([made.B.flatten(), made.A.flatten()]), cut.clamp)
    return Factors(made.A.clamp(-top, top), made.B.clamp(-top, top))


def _lost(S: Tensor, kept: int) -> float:
    """The share of a matrix, by its Frobenius norm, that is in the singular values after these."""
    squares = S.double().square().sum(0)
    whole = float(squares.sum())
    return (float(squares[kept:].sum()) / whole) ** 0.5 if whole else 0.0


def _quantile(values: Tensor, share: float) -> Tensor:
    """As `torch.quantile`, which takes no more than 16 million values."""
    ordered, place = values.sort().values, share * (values.numel() - 1)
    low = int(place)
    return ordered[low].lerp(ordered[min(low + 1, len(ordered) - 1)], place - low)
