# SPDX-License-Identifier: Apache-2.0
"""DeLoRA: decoupled low-rank adaptation (arXiv 2503.18225).   dW = (λ / r) Σ bi ai^T / (|bi| |ai|) · diag(|W|)

A `[r, in]` and B `[out, r]` give directions alone; λ, one trained number, gives the strength, in units of the norms of
W's columns. Those are measured once, on the weight that the adapter starts from, and saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import Excludes, Layers, PeftConfig, Saves, Targets
from ..core.method import Spec, View
from ..core.target import by_pattern
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import LowRank, kaiming

LEAST = 1e-4
"""The shortest that a direction is taken to be, so that one of length 0 gives no change."""


@dataclass(kw_only=True)
class DeloraConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """DeLoRA.

    Args:
        r: the rank. delora_lambda: the strength at the start. rank_pattern, lambda_pattern: others for layers whose path
            ends in a key (a regex).
        module_dropout: dropout on the adapter's input.
        init_weights: True (zero B: no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "delora_only" (of adapted layers).
    """

    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)

    def check(self) -> None:
        for name, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            self.require(rank > 0, f"rank {name}={rank}; a positive number is needed.")
        self.require(
            0 <= self.module_dropout < 1, f"module_dropout={self.module_dropout}; allowed: 0 up to, not with, 1."
        )
        self.require(
            self.bias in ("none", "all", "delora_only"), f"bias={self.bias!r}; allowed: none, all, delora_only."
        )


@method("delora", DeloraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class DeLoRA(LowRank):
    dropout = "delora_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, DeloraConfig)
        return {
            "r": by_pattern(config.rank_pattern, key, config.r),
            "strength": by_pattern(config.lambda_pattern, key, config.delora_lambda),
            "delora_dropout": input_dropout(site, key, "module_dropout", config.module_dropout),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {
            "delora_A": Spec((p.r, site.columns)),
            "delora_B": Spec((site.features_out, p.r)),
            "delora_lambda": Spec((1,)),
            "delora_w_norm": Spec((site.columns,), trainable=False),
        }

    def init(self, p: View) -> None:
        kaiming(p.delora_A, p.site.stack)
        kaiming(p.delora_B, p.site.stack)
        if p.init_weights:
            p.delora_B.zero_()
        p.delora_lambda.fill_(p.strength)
        W = p.site.read()[0].float()
        p.delora_w_norm.copy_(W.norm(dim=1 if p.site.stack else 0).reshape(p.delora_w_norm.shape))

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        A = p.delora_A / p.delora_A.norm(dim=1, keepdim=True).clamp(min=LEAST) * p.delora_w_norm
        B = p.delora_B / p.delora_B.norm(dim=0).clamp(min=LEAST)
        return A, B * (p.delora_lambda / p.r)
