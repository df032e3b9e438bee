# SPDX-License-Identifier: Apache-2.0
"""HiRA: Hadamard high-rank adaptation (ICLR 2025, openreview TwJrTz9cRS).   W' = W * (1 + B A)

A `[r, in]` and B `[out, r]`; the product is element by element, so the change has a rank up to r times that of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Rewrite, Spec, Stage, View, Weights
from ..core.target import by_pattern
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import check_dropout


@dataclass(kw_only=True)
class HiraConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """HiRA.

    Args:
        r: the rank of the factor. rank_pattern: other ranks for layers whose path ends in a key (a regex).
        hira_dropout: dropout on the input of what the adapter adds.
        init_weights: True (kaiming A, zero B), "gaussian" (A from N(0, 1/r)), False or None (both random).
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    def check(self) -> None:
        for name, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            self.require(rank > 0, f"rank {name}={rank}; a positive number is needed.")
        self.require(0 <= self.hira_dropout < 1, f"hira_dropout={self.hira_dropout}; allowed: 0 up to, not with, 1.")
        if isinstance(self.init_weights, str):
            known = self.init_weights.lower() == "gaussian"
            self.require(known, f"init_weights={self.init_weights!r}; allowed: True, False, None, 'gaussian'.")


@method("hira", HiraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class HiRA(Rewrite):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, HiraConfig)
        check_dropout(site, key, "hira_dropout", config.hira_dropout)
        dropout = nn.Dropout(config.hira_dropout) if config.hira_dropout else nn.Identity()
        return {"r": by_pattern(config.rank_pattern, key, config.r), "hira_dropout": dropout}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        ones = (1,) * len(site.kernel)
        name = "hira_embedding" if isinstance(site, Embedding) else "hira"
        return {
            f"{name}_A": Spec((p.r, site.features_in // site.groups, *site.kernel)),
            f"{name}_B": Spec((site.features_out, p.r, *ones)),
        }

    def init(self, p: View) -> None:
        A, B = factors(p)
        start, zero = (B, A) if isinstance(p.site, Embedding) else (A, B)
        start.normal_()
        zero.normal_()
        if p.init_weights:
            zero.zero_()
        if isinstance(p.init_weights, str):
            start.normal_(std=1 / p.r)
        elif p.init_weights and start is A:
            bound = 1 / math.sqrt(math.prod(p.site.kernel, start=A.shape[2 if p.site.stack else 1]))
            start.uniform_(-bound, bound)

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        return W + W * self._factor(p), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """One operation with W', unless what the adapter adds sees another input, or only some rows of W are wanted."""
        dropping = p.hira_dropout.training and not isinstance(p.hira_dropout, nn.Identity)
        W, _ = before.origin()
        if not x.is_floating_point():
            A, B = factors(p)
            return before(x) + p.site.op(x, W) * p.site.mix(F.embedding(x, A.T), B)
        if dropping:
            return before(x) + p.site.op(p.hira_dropout(p.cast(x)).to(W.dtype), W * self._factor(p))
        return super().forward(p, x, before)

    def _factor(self, p: View) -> Tensor:
        A, B = factors(p)
        return (B.flatten(1) @ A.flatten(1)).unflatten(1, A.shape[1:])


def factors(p: View) -> tuple[Tensor, Tensor]:
    """A and B, by whatever name they have on this site."""
    if isinstance(p.site, Embedding):
        return p.hira_embedding_A, p.hira_embedding_B
    return p.hira_A, p.hira_B
