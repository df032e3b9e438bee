# SPDX-License-Identifier: Apache-2.0
"""BEFT: bias-efficient fine-tuning (arXiv 2509.15974).   b' = b + d

d is `[1, out]`. A layer without a bias is adapted too; merging alone needs one to write into.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import PeftConfig, Saves, Targets
from ..core.method import Rewrite, Spec, Stage, View, Weights
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Linear, Site


@dataclass(kw_only=True)
class BeftConfig(Targets, Saves, PeftConfig):
    """BEFT. init_weights: True (zeros: no change at first) or False (random)."""

    init_weights: bool = True


@method("beft", BeftConfig, sites=(Linear, Conv1D, Conv, Attention))
class BEFT(Rewrite):
    reads_weight = False

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"beft_bias": Spec((1, site.features_out))}

    def init(self, p: View) -> None:
        if p.init_weights:
            p.beft_bias.zero_()
        else:
            p.beft_bias.normal_()

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        d = p.beft_bias[0]
        return W, d if b is None else b + d

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        return p.site.on_channels(lambda y: y + p.beft_bias[0], before(x))
