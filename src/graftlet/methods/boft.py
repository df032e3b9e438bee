# SPDX-License-Identifier: Apache-2.0
"""BOFT: butterfly orthogonal fine-tuning (arXiv 2311.06243).   W' = diag(s) W R^T,   R = F1 F2 ... Fm,   b' = b

A factor F turns b x b blocks by the Cayley transform of Q = (X - X^T) / 2, X a block of `boft_R` `[m, in / b, b, b]`.
The first factor's blocks stand side by side. A block of the i-th (from 0) pairs half a block of the first half of a
segment of 2^i blocks with the half-block at the same place in its second half, so that m factors mix 2^(m - 1) blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import InputMap, Spec, Stage, View, Weights
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import check_dropout
from .parts.rotation import BlockDropout, cayley


@dataclass(kw_only=True)
class BOFTConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """BOFT.

    Args:
        boft_block_size: the size of the blocks. boft_block_num: how many there are. One of the two, the other 0; it must
            divide a layer's inputs.
        boft_n_butterfly_factor: the number of factors. With more than one, blocks must be even, and 2^(factors - 1) of
            them must divide a layer's inputs.
        boft_dropout: the share of blocks that are left out (become the identity) in a training step.
        init_weights: True (no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "boft_only" (of adapted layers).
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True

    def check(self) -> None:
        sizes = (self.boft_block_size, self.boft_block_num)
        given = f"boft_block_size={sizes[0]} and boft_block_num={sizes[1]}"
        self.require(min(sizes) == 0 < max(sizes), f"{given}; one must be positive and the other 0.")
        factors = self.boft_n_butterfly_factor
        self.require(factors >= 0, f"boft_n_butterfly_factor={factors}; 1 or more is needed.")
        self.require(0 <= self.boft_dropout < 1, f"boft_dropout={self.boft_dropout}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "boft_only"), f"bias={self.bias!r}; allowed: none, all, boft_only.")


@method("boft", BOFTConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class BOFT(InputMap):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, BOFTConfig)
        check_dropout(site, key, "boft_dropout", config.boft_dropout)
        n, given = site.basis, config.boft_block_num or config.boft_block_size
        config.require(
            n % given == 0, f"{given} blocks, or blocks of {given}, do not divide the {n} inputs of {key!r}."
        )
        size = n // given if config.boft_block_num else given
        factors = max(config.boft_n_butterfly_factor, 1)
        even = factors == 1 or (size % 2 == 0 and n % (size << (factors - 1)) == 0)
        config.require(
            even,
            f"boft_n_butterfly_factor={factors} with blocks of {size} needs even blocks, and {1 << (factors - 1)} of "
            f"them to divide the {n} inputs of {key!r}.",
        )
        return {"boft_block_size": size, "factors": factors, "boft_dropout": BlockDropout(config.boft_dropout)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        size, out = p.boft_block_size, site.features_out
        R = (p.factors, site.basis // size, size, size)
        return {"boft_R": Spec(R), "boft_s": Spec((1, out) if site.kernel else (out, 1))}

    def init(self, p: View) -> None:
        if p.init_weights:
            p.boft_R.zero_()
            p.boft_s.fill_(1)
        else:
            p.boft_R.normal_(0, 0.1)
            p.boft_s.normal_(1, 0.1)

    def unpack(self, p: View, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first factor alone is the same with more factors that turn nothing: some writers make no others."""
        R = given.get("boft_R")
        if R is None or p.site.stack or R.shape[:1] != (1,) or p.factors == 1:
            return given
        return {**given, "boft_R": torch.cat([R, R.new_zeros(p.factors - 1, *R.shape[1:])])}

    def map(self, p: View, v: Tensor, transpose: bool = False) -> Tensor:
        R = (vars(p)["dropped"] if "dropped" in vars(p) else rotations(p)).to(v.dtype)
        for i in range(p.factors) if transpose else reversed(range(p.factors)):
            v = turned(v, R[i].mT if transpose else R[i], p.boft_block_size, 1 << i)
        return v

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        W, b = super().transform(p, W, b)
        return p.site.on_out(lambda v: v * p.boft_s.flatten(), W), b

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Factor by factor, in the other order."""
        if p.site.stack:
            return super().back(p, like)
        blocks = p.over({"dropped": torch.linalg.inv(rotations(p).double()).mT})

        def turned_back(rows: Tensor) -> Tensor:
            return self.map(blocks, rows, transpose=p.site.maps_output)

        return lambda W: p.site.on_rows(turned_back, p.site.on_out(lambda v: v / p.boft_s.flatten(), W))

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        if p.boft_dropout.acts:  # here and not in `map`, which merging uses too
            p = p.over({"dropped": p.boft_dropout(rotations(p))})
        y = super().forward(p, x, before)
        if p.site.kernel:
            return y  # the weight has been scaled
        s, b = p.boft_s.flatten(), before.bias()
        return p.cast(y) * s if b is None else p.cast(y) * s + b * (1 - s)


def rotations(p: View) -> Tensor:
    """All blocks of all factors `[m, n, b, b]`, in at least single precision."""
    X = p.boft_R.to(torch.promote_types(p.boft_R.dtype, torch.float32))
    return cayley((X - X.mT) / 2)


def turned(v: Tensor, R: Tensor, size: int, segment: int) -> Tensor:
    """v F for rows v, where the blocks R pair the half-blocks of the two halves of every segment of so many blocks."""
    if segment > 1:
        v = v.unflatten(-1, (-1, 2, segment, size // 2)).transpose(-3, -2).flatten(-4)
    v = torch.einsum("...ni,nij->...nj", v.unflatten(-1, (-1, size)), R).flatten(-2)
    if segment > 1:
        v = v.unflatten(-1, (-1, segment, 2, size // 2)).transpose(-3, -2).flatten(-4)
    return v
