# SPDX-License-Identifier: Apache-2.0
"""One basis V for several matrices, Wi = Bi V^T: the higher-order generalised singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor


def joint(weights: list[Tensor], alpha: float) -> Tensor:
    """V of all weights: their stack is Q R, and V = R^T Z by the eigenvectors Z of the mean of (Qi^T Qi + alpha I)^-1."""
    stack = torch.cat(weights)
    n = stack.shape[1]
    if len(stack) < n:
        return torch.linalg.svd(stack)[2].T
    Q, R = torch.linalg.qr(stack)
    one = torch.eye(n, dtype=Q.dtype, device=Q.device)
    parts = Q.split([len(w) for w in weights])
    mean = torch.stack([torch.linalg.inv(q.T @ q + alpha * one) for q in parts]).mean(0)
    return R.T @ torch.linalg.eigh(mean)[1]
