# SPDX-License-Identifier: Apache-2.0
"""HRA: Householder reflection adaptation (arXiv 2405.17484).   W' = W (I - 2 u1 u1^T) ... (I - 2 ur ur^T),  |uk| = 1

u is `[in, r]`, one column a reflection. `apply_GS` makes the columns orthonormal first: W' = W (I - 2 Q Q^T).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Excludes, Layers, PeftConfig, Saves, Targets
from ..core.method import InputMap, Spec, View
from ..errors import StartWarning, warn
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site


@dataclass(kw_only=True)
class HRAConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """HRA.

    Args:
        r: the number of reflections; an even number starts as the identity.
        apply_GS: reflect at an orthonormal basis, by Gram-Schmidt, instead of one reflection after the other.
        init_weights: True (equal pairs, which cancel) or False (all different).
        bias: train the base's biases: "none", "all", or "hra_only" (of adapted layers).
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.bias in ("none", "all", "hra_only"), f"bias={self.bias!r}; allowed: none, all, hra_only.")


@method("hra", HRAConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class HRA(InputMap):
    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"hra_u": Spec((site.basis, p.r))}

    def init(self, p: View) -> None:
        """Each reflection twice: the second undoes the first. An odd one out stays alone."""
        if p.r % 2 and p.init_weights:
            warn(
                StartWarning, f"HRAConfig.r={p.r} is odd: a new adapter changes the model; with an even r it does not."
            )
        u = p.hra_u
        paired = p.init_weights and p.r % 2 == 0
        start = torch.empty(*u.shape[:-1], p.r // 2 if paired else p.r, device=u.device)
        start.uniform_(-1, 1).div_(math.sqrt(start.shape[-1]))
        u.copy_(start.repeat_interleave(2, dim=-1) if paired else start)

    def map(self, p: View, v: Tensor, transpose: bool = False) -> Tensor:
        Q, T = orthonormal(p.hra_u) if p.apply_GS else reflections(p.hra_u)
        Q, T = Q.to(v.dtype), T.to(v.dtype)
        return v - v @ Q @ (T if transpose else T.T) @ Q.T

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Reflections in the other order."""
        if p.site.stack:
            return super().back(p, like)
        return lambda W: p.site.on_rows(lambda rows: self.map(p, rows, transpose=p.site.maps_output), W)


def reflections(u: Tensor) -> tuple[Tensor, Tensor]:
    """Q, T with (I - 2 q1 q1^T) ... (I - 2 qr qr^T) = I - Q T Q^T: two thin products instead of r steps.

    T is the inverse of the upper triangle of Q^T Q with 1/2 on the diagonal (the compact WY form).
    """
    Q = unit(u)
    r = u.shape[1]
    half = torch.eye(r, dtype=Q.dtype, device=Q.device) / 2
    T = torch.linalg.solve_triangular(torch.triu(Q.T @ Q, 1) + half, 2 * half, upper=True)
    return Q, T


def orthonormal(u: Tensor) -> tuple[Tensor, Tensor]:
    """Q by Gram-Schmidt on the columns of u, T = 2 I."""
    columns: list[Tensor] = []
    for column in u.to(torch.promote_types(u.dtype, torch.float32)).unbind(1):
        for q in columns:
            column = column - q * (q @ column)
        columns.append(column / column.norm())
    Q = torch.stack(columns, 1)
    return Q, 2 * torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)


def unit(u: Tensor) -> Tensor:
    """Columns of length one, in at least single precision."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    return u / u.norm(dim=0)
