# SPDX-License-Identifier: Apache-2.0
"""GraLoRA: granular low-rank adaptation (arXiv 2505.20355).   dW = s [B_m^n A_n^m] in k x k blocks (+ s B A)

Every block of dW, from inputs n to outputs m, has a rank r / k of its own. A `[k, in / k, r]` holds what each part of
the input gives, its r numbers in k runs, one for each part of the output; B `[k, r, out / k]` what each part of the
output takes, its r numbers in k runs, one from each part of the input. A hybrid has a plain low rank beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import kaiming, shaped, through


@dataclass(kw_only=True)
class GraloraConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """GraLoRA.

    Args:
        r: the rank of a row or column of blocks. gralora_k: how many blocks a side, a divisor of r.
        hybrid_r: the rank of a plain low-rank part beside the blocks; 0 for none.
        alpha: dW is multiplied by alpha / (r + hybrid_r).
        gralora_dropout: dropout on the adapter's input.
        init_weights: True (zero B: no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "gralora_only" (of adapted layers).
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    init_weights: bool = True
    bias: str = "none"

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.hybrid_r >= 0, f"hybrid_r={self.hybrid_r}; 0 or more is needed.")
        whole = self.gralora_k > 0 and self.r % self.gralora_k == 0
        self.require(whole, f"gralora_k={self.gralora_k} must be a divisor of r={self.r}: a block has a rank of r / k.")
        rate = self.gralora_dropout
        self.require(0 <= rate < 1, f"gralora_dropout={rate}; allowed: 0 up to, not with, 1.")
        self.require(
            self.bias in ("none", "all", "gralora_only"), f"bias={self.bias!r}; allowed: none, all, gralora_only."
        )


@method("gralora", GraloraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class GraLoRA(Delta):
    dropout = "gralora_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, GraloraConfig)
        k = config.gralora_k
        if site.columns % k or site.features_out % k:
            raise ConfigError(
                f"gralora_k={k} must divide the {site.columns} inputs and {site.features_out} outputs of {key!r}."
            )
        return {
            "scaling": config.alpha / (config.r + config.hybrid_r),
            "gralora_dropout": input_dropout(site, key, "gralora_dropout", config.gralora_dropout),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        k = p.gralora_k
        blocks = {
            "gralora_A": Spec((k, site.columns // k, p.r)),
            "gralora_B": Spec((k, p.r, site.features_out // k)),
        }
        plain = {
            "gralora_A_general.weight": Spec((p.hybrid_r, site.columns)),
            "gralora_B_general.weight": Spec((site.features_out, p.hybrid_r)),
        }
        return {**blocks, **plain} if p.hybrid_r else blocks

    def init(self, p: View) -> None:
        kaiming(p.gralora_A, inputs=p.site.columns // p.gralora_k)
        kaiming(p.gralora_B, inputs=p.r)
        if p.hybrid_r:
            kaiming(p.gralora_A_general, p.site.stack)
            kaiming(p.gralora_B_general, p.site.stack)
        for last in (p.gralora_B, *([p.gralora_B_general] if p.hybrid_r else [])) if p.init_weights else ():
            last.zero_()

    def delta(self, p: View) -> Tensor:
        A, B = runs(p)
        dW = torch.einsum("nimr,mnro->moni", A, B).flatten(2).flatten(0, 1)
        if p.hybrid_r:
            dW = dW + p.gralora_B_general @ p.gralora_A_general
        return shaped(p.site, dW * p.scaling)

    def update(self, p: View, x: Tensor) -> Tensor:
        """Each part of the input through its A, the runs to where they belong, and each part's B."""
        if p.site.kernel or not x.is_floating_point():
            return super().update(p, x)
        A, B = runs(p)
        h = torch.einsum("...ni,nimr->...mnr", x.unflatten(-1, (p.gralora_k, -1)), A)
        y = torch.einsum("...mnr,mnro->...mo", h, B).flatten(-2)
        if p.hybrid_r:
            y = y + through(p.site, x, p.gralora_A_general, p.gralora_B_general)
        return y * p.scaling


def runs(p: View) -> tuple[Tensor, Tensor]:
    """A as `[n, i, m, r / k]` and B as `[m, n, r / k, o]`: the ranks by the other side's part."""
    return p.gralora_A.unflatten(-1, (p.gralora_k, -1)), p.gralora_B.unflatten(-2, (p.gralora_k, -1))
