# SPDX-License-Identifier: Apache-2.0
"""LoHa: Hadamard product of two low ranks (arXiv 2108.06098).   dW = s (A1 B1) * (A2 B2),   s = alpha / r

A `[out, r]` and B `[r, in * kernel]`; the product is element by element. Its rank is up to r^2, and it is a product of
thin matrices itself: row o of the left one is A1[o] x A2[o], column i of the right one B1[i] x B2[i], by outer products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import PeftConfig
from ..core.algebra import Factors
from ..core.method import Spec, View
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.low_rank import LowRank, kaiming, shaped
from .parts.lycoris import LycorisConfig, core, core_shape, dropped, resolved


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa.

    Args:
        r: the rank of each product. alpha: dW is multiplied by alpha / r. rank_pattern, alpha_pattern: others for layers
            whose path ends in a key (a regex).
        rank_dropout: the share of outputs that the adapter leaves alone in a training step; the others are scaled up.
        module_dropout: the share of training steps in which it leaves a layer alone.
        use_effective_conv2d: for kernels larger than 1, a core tensor `[r, r, *kernel]` in each product.
        init_weights: True (zero B2: no change at first) or False (random).
    """

    init_weights: bool = True


@method("loha", LoHaConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter), prefix="hada_")
class LoHa(LowRank):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, LoHaConfig)
        cored = config.use_effective_conv2d and math.prod(site.kernel) > 1
        return {**resolved(site, config, key, rescale=True), "cored": cored}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        a, b = Spec((site.features_out, p.r)), Spec((p.r, site.columns))
        if p.cored:
            a, b = Spec((p.r, site.features_out)), Spec((p.r, site.shape[1]))
        specs = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        cores = {"hada_t1": Spec(core_shape(site, p.r)), "hada_t2": Spec(core_shape(site, p.r))}
        return {**specs, **cores} if p.cored else specs

    def init(self, p: View) -> None:
        for factor in (
            p.hada_w1_a,
            p.hada_w1_b,
            p.hada_w2_a,
            p.hada_w2_b,
            *((p.hada_t1, p.hada_t2) if p.cored else ()),
        ):
            kaiming(factor, p.site.stack)
        if p.init_weights:
            p.hada_w2_b.zero_()

    def delta(self, p: View) -> Tensor:
        if p.cored:
            one, two = (
                core(*pair) for pair in ((p.hada_t1, p.hada_w1_a, p.hada_w1_b), (p.hada_t2, p.hada_w2_a, p.hada_w2_b))
            )
        else:
            one, two = p.hada_w1_a @ p.hada_w1_b, p.hada_w2_a @ p.hada_w2_b
        return shaped(p.site, one * two * p.scaling)

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        left = p.hada_w1_a[:, :, None] * p.hada_w2_a[:, None] * p.scaling
        right = p.hada_w1_b[:, None] * p.hada_w2_b
        return right.flatten(0, 1), left.flatten(1)

    def factored(self, p: View) -> Factors | None:
        return None if p.cored else super().factored(p)  # with a core it is a product of sums

    def update(self, p: View, x: Tensor) -> Tensor:
        """Through the thin matrices, unless they are no thinner than dW."""
        out, columns = p.site.features_out, p.site.columns
        thin = not p.cored and p.r**2 * (out + columns) < out * columns
        return dropped(p, super().update(p, x) if thin else p.site.op(x, self.delta(p)))
