# SPDX-License-Identifier: Apache-2.0
"""The largest singular directions of a matrix: exactly, or by a projection where that is faster and as good.

The projection is a subspace iteration (Halko et al., SIAM Review 2011): `Q <- qr(M qr(M^T Q))`. It goes on until another
round holds no more of the matrix; where that takes too long, as for a flat spectrum, the exact way is gone after all.
"""

from __future__ import annotations

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]
"""U `[m, k]`, S `[k]`, Vh `[k, n]`."""

SMALL = 512
"""The shorter side up to which the exact way is quick enough."""
SPARE = 8
"""Directions that are carried along beside those asked for."""
ROUNDS = 8
ENOUGH = 1e-6
"""The share of |M|^2 below which a further round does not pay."""


def leading(M: Tensor, rank: int) -> Triplets:
    """The first `rank` singular triplets of a matrix, the largest first."""
    found = None if _small(M, rank) else _projected(M, rank)
    return _exact(M, rank) if found is None else found


def share(M: Tensor, energy: float) -> Triplets:
    """The fewest singular triplets, one at least, that hold this share of the sum of all squared singular values."""
    rank = SPARE
    while not _small(M, rank):
        found = _projected(M, rank)
        if found is None:
            break
        count = _enough(found[1], energy, float(M.square().sum()))
        if count is not None:
            return _cut(found, count)
        rank *= 4
    whole = _exact(M, min(M.shape))
    return _cut(whole, _enough(whole[1], energy, float(whole[1].square().sum())) or len(whole[1]))


def _small(M: Tensor, rank: int) -> bool:
    return min(M.shape) <= SMALL or 4 * rank > min(M.shape)


def _exact(M: Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return _cut((U, S, Vh), rank)


def _cut(triplets: Triplets, rank: int) -> Triplets:
    U, S, Vh = triplets
    return U[:, :rank], S[:rank], Vh[:rank]


def _enough(S: Tensor, energy: float, total: float) -> int | None:
    """How many singular values hold the share of the total; None where all that are known do not."""
    held = S.square().cumsum(0)
    wanted = torch.tensor(energy * total, dtype=held.dtype, device=held.device)
    count = int(torch.searchsorted(held, wanted)) + 1
    return count if count <= len(S) else None


def _projected(M: Tensor, rank: int) -> Triplets | None:
    """The first triplets by subspace iteration, the same every time; None where it does not settle."""
    generator = torch.Generator().manual_seed(0)
    width = rank + max(SPARE, rank // 2)
    start = torch.randn(M.shape[1], width, generator=generator, dtype=M.dtype).to(M.device)
    Q, _ = torch.linalg.qr(M @ start)
    total, before = M.square().sum(), M.new_zeros(())
    for _ in range(ROUNDS):
        Z, _ = torch.linalg.qr(M.T @ Q)
        Q, R = torch.linalg.qr(M @ Z)
        U, S, Vh = torch.linalg.svd(R)
        held = S[:rank].square().sum()
        if held - before <= ENOUGH * total:
            return Q @ U[:, :rank], S[:rank], Vh[:rank] @ Z.T
        before = held
    return None
