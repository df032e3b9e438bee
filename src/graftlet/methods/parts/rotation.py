# SPDX-License-Identifier: Apache-2.0
"""Rotations made from skew-symmetric matrices, and a dropout that keeps them rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.context import kept


def skew(v: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices `[n, size, size]` from their upper triangles, row by row."""
    flat = v.new_zeros(v.shape[0], size * size).index_copy(1, _above(size, v.device), v)
    upper = flat.view(-1, size, size)
    return upper - upper.mT


@kept
def _above(size: int, device: torch.device) -> Tensor:
    """Where the entries above the diagonal stand in a matrix, row by row."""
    i, j = torch.triu_indices(size, size, 1, device=device)
    return i * size + j


@kept
def identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity, which many layers ask for; nobody writes into it."""
    return torch.eye(size, dtype=dtype, device=device)


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1: orthogonal for any skew-symmetric Q."""
    one = identity(Q.shape[-1], Q.dtype, Q.device)
    return torch.linalg.solve_ex(one + Q, one - Q)[0]  # never singular: to ask whether it is would wait for the device


def neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), near (I + Q) (I - Q)^-1 for small Q. The format reads 3 terms as 4."""
    R = identity(Q.shape[-1], Q.dtype, Q.device).expand_as(Q)
    if terms > 1:
        R = torch.add(R, Q, alpha=2)
    power, last = Q, max(terms, 4) - 1
    for k in range(2, last + 1 if terms > 2 else 0):
        power = power @ Q
        R = torch.add(R, power, alpha=1 if k == last else 2)
    return R


class BlockDropout(nn.Module):
    """Puts the identity in place of each block with probability p, in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def acts(self) -> bool:
        return self.training and self.p > 0

    def forward(self, R: Tensor) -> Tensor:
        out = torch.rand(*R.shape[:-2], 1, 1, device=R.device) < self.p
        return torch.where(out, identity(R.shape[-1], R.dtype, R.device), R)
