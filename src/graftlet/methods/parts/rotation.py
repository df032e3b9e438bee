# SPDX-License-Identifier: Apache-2.0
"""Rotations made from skew-symmetric matrices, and a dropout that keeps them rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def skew(v: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices `[n, size, size]` from their upper triangles, row by row."""
    i, j = torch.triu_indices(size, size, 1, device=v.device)
    upper = v.new_zeros(v.shape[0], size * size).index_copy(1, i * size + j, v).unflatten(1, (size, size))
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1: orthogonal for any skew-symmetric Q."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(one + Q, one - Q)


def neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), near (I + Q) (I - Q)^-1 for small Q. The format reads 3 terms as 4."""
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms > 1:
        R = R + 2 * Q
    power, last = Q, max(terms, 4) - 1
    for k in range(2, last + 1 if terms > 2 else 0):
        power = power @ Q
        R = R + (power if k == last else 2 * power)
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
        return torch.where(out, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), R)
