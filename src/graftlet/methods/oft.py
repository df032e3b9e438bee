# SPDX-License-Identifier: Apache-2.0
"""OFT: orthogonal fine-tuning (arXiv 2306.07280, 2506.19847).   W' = W R^T, so that y = base(x R)

R has b x b blocks on its diagonal. A block is the Cayley transform of a skew-symmetric Q, whose upper triangle is a row
of `oft_R` `[in / b, b (b - 1) / 2]`: exactly (I - Q) (I + Q)^-1, or, by default, the first terms of the Neumann series
of (I + Q) (I - Q)^-1, which turns the other way. COFT keeps |Q| small. On an embedding the rows looked up are turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import InputMap, Spec, Stage, View
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import check_dropout
from .parts.rotation import BlockDropout, cayley, identity, neumann, skew


@dataclass(kw_only=True)
class OFTConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """OFT.

    Args:
        r: the number of blocks. oft_block_size: their size. One of the two, the other 0; it is moved to the nearest
            divisor of a layer's inputs.
        module_dropout: the share of blocks that are left out (become the identity) in a training step.
        coft: keep every block within `eps` / sqrt(blocks) of the identity, by the norm of Q.
        block_share: one block for all places.
        use_cayley_neumann: the series, of num_cayley_neumann_terms terms, instead of solving exactly.
        init_weights: True (no rotation at first) or False (random).
        bias: train the base's biases: "none", "all", or "oft_only" (of adapted layers).
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def check(self) -> None:
        given = f"r={self.r} and oft_block_size={self.oft_block_size}"
        one = (self.r > 0) != (self.oft_block_size > 0) and min(self.r, self.oft_block_size) == 0
        self.require(one, f"{given}; one must be positive and the other 0, since their product is the layer's inputs.")
        self.require(
            0 <= self.module_dropout < 1, f"module_dropout={self.module_dropout}; allowed: 0 up to, not with, 1."
        )
        self.require(self.bias in ("none", "all", "oft_only"), f"bias={self.bias!r}; allowed: none, all, oft_only.")
        terms = self.num_cayley_neumann_terms
        self.require(
            not self.use_cayley_neumann or terms > 0, f"num_cayley_neumann_terms={terms}; at least 1 is needed."
        )
        self.require(self.eps > 0, f"eps={self.eps}; a positive number is needed.")


@method("oft", OFTConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class OFT(InputMap):
    halves = True

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, OFTConfig)
        check_dropout(site, key, "module_dropout", config.module_dropout)
        if config.r:
            r = divisor(site.basis, config.r)
            size = site.basis // r
        else:
            size = divisor(site.basis, config.oft_block_size)
            r = site.basis // size
        return {"r": r, "oft_block_size": size, "oft_dropout": BlockDropout(config.module_dropout)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        shape = (1 if p.block_share else p.r, p.oft_block_size * (p.oft_block_size - 1) // 2)
        return {("oft_embedding_R" if isinstance(site, Embedding) else "oft_R") + ".weight": Spec(shape)}

    def init(self, p: View) -> None:
        if p.init_weights:
            angles(p).zero_()
        else:
            angles(p).normal_(std=0.1)

    def map(self, p: View, v: Tensor, transpose: bool = False) -> Tensor:
        R = vars(p)["dropped"] if "dropped" in vars(p) else rotation(p)
        turn = (R.mT if transpose else R) - identity(p.oft_block_size, R.dtype, R.device)
        turn = turn.expand(p.r, -1, -1).to(v.dtype)
        return v + torch.einsum("...ni,nij->...nj", v.unflatten(-1, (p.r, p.oft_block_size)), turn).flatten(-2)

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Block by block; the blocks of a Cayley series are no rotations to the last digit."""
        if p.site.stack:
            return super().back(p, like)
        turned_back = p.over({"dropped": torch.linalg.inv(rotation(p).double())})
        return lambda W: self.transform(turned_back, W, None)[0]

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        if p.oft_dropout.acts:  # here and not in `map`, which merging uses too
            p = p.over({"dropped": p.oft_dropout(rotation(p).expand(p.r, -1, -1))})
        return super().forward(p, x, before)


def angles(p: View) -> Tensor:
    """The blocks' upper triangles, by whatever name they have on this site."""
    return p.oft_embedding_R if isinstance(p.site, Embedding) else p.oft_R


def rotation(p: View) -> Tensor:
    """R, block by block: `[blocks (1 where shared), b, b]`, in at least single precision."""
    v = near(angles(p), p.eps) if p.coft else angles(p)
    Q = skew(v.to(torch.promote_types(v.dtype, torch.float32)), p.oft_block_size)
    return neumann(Q, p.num_cayley_neumann_terms) if p.use_cayley_neumann else cayley(Q)


def near(v: Tensor, eps: float) -> Tensor:
    """Each row shrunk to |Q| <= eps / sqrt(rows); a parameter in training is moved there: projected descent."""
    training = torch.is_grad_enabled() and v.is_leaf and v.requires_grad
    with torch.no_grad():
        norm = v.norm(dim=1, keepdim=True) * math.sqrt(2)  # |Q|: every entry of v stands in Q twice
        shrink = (eps / math.sqrt(v.shape[0]) / norm).clamp(max=1)
        if training:
            v.mul_(shrink)
            return v
    return v * shrink


def divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to what is wanted; of two as near, the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
