# SPDX-License-Identifier: Apache-2.0
"""LoKr: Kronecker product with a low rank (arXiv 2309.14859).   dW = s (W1 ⊗ W2),   s = alpha / r

W1 is `[j, m]` and W2 `[k, n, *kernel]`, where in = m n and out = j k are split as squarely as they can be. Each is held
whole, or as a product of rank r where that is smaller. Applied to an input seen as `[m, n]` it is W1 X W2^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import PeftConfig
from ..core.method import Delta, Spec, View
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.low_rank import kaiming, shaped
from .parts.lycoris import LycorisConfig, core, core_shape, dropped, resolved


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr.

    Args:
        r: the rank. alpha: dW is multiplied by alpha / r. rank_pattern, alpha_pattern: others for layers whose path ends
            in a key (a regex).
        decompose_factor: split in and out by this factor where it divides them, and else by the largest divisor up to
            it; -1 for as squarely as they can be. decompose_both: W1 too as a product of rank r.
        rank_dropout: the share of outputs that the adapter leaves alone in a training step. rank_dropout_scale: scale the
            others up. module_dropout: the share of training steps in which it leaves a layer alone.
        use_effective_conv2d: for kernels larger than 1, a core tensor `[r, r, *kernel]` in W2.
        init_weights: True (zero W1: no change at first), "lycoris" (zero W2 instead) or False (random).
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def check(self) -> None:
        super().check()
        self.require(
            self.decompose_factor == -1 or self.decompose_factor > 0,
            f"decompose_factor={self.decompose_factor}; a positive number, or -1, is needed.",
        )


@method("lokr", LoKrConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class LoKr(Delta):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, LoKrConfig)
        inner = site.features_in // site.groups
        (j, k), (m, n) = (factorization(size, config.decompose_factor) for size in (site.features_out, inner))
        return {**resolved(site, config, key, config.rank_dropout_scale), "first": (j, m), "second": (k, n)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        (j, m), (k, n) = p.first, p.second
        specs = {"lokr_w1": Spec((j, m))}
        if p.decompose_both and p.r < max(j, m) / 2:
            specs = {"lokr_w1_a": Spec((j, p.r)), "lokr_w1_b": Spec((p.r, m))}
        if p.r >= max(k, n) / 2:
            return {**specs, "lokr_w2": Spec((k, n, *site.kernel))}
        if p.use_effective_conv2d and math.prod(site.kernel) > 1:
            cored = {"lokr_t2": Spec(core_shape(site, p.r)), "lokr_w2_a": Spec((p.r, k)), "lokr_w2_b": Spec((p.r, n))}
            return {**specs, **cored}
        return {**specs, "lokr_w2_a": Spec((k, p.r)), "lokr_w2_b": Spec((p.r, n * math.prod(site.kernel)))}

    def init(self, p: View) -> None:
        held = {n: t for n, t in vars(p).items() if n.startswith("lokr_")}
        for factor in held.values():
            kaiming(factor, p.site.stack)
        if p.init_weights:
            zero = ("lokr_w2", "lokr_w2_b") if p.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
            next(held[n] for n in zero if n in held).zero_()

    def delta(self, p: View) -> Tensor:
        W1, W2 = factors(p)
        if shifted(p):
            return shaped(p.site, torch.kron(W1, W2) * p.scaling)
        product = torch.einsum("jm,kn...->jkmn...", W1, W2).flatten(0, 1).flatten(1, 2)
        return shaped(p.site, product * p.scaling)

    def update(self, p: View, x: Tensor) -> Tensor:
        """W2 on each of the m parts of the input, then W1 on the m results."""
        if p.site.groups > 1 or shifted(p) or not x.is_floating_point():
            return dropped(p, p.site.op(x, self.delta(p)))
        W1, W2 = factors(p)
        channels = -1 - len(p.site.kernel)
        parts = x.unflatten(channels, (W1.shape[1], -1))
        h = p.site.op(parts.flatten(0, channels - 1), W2)
        y = torch.einsum("jm,bmk...->bjk...", W1 * p.scaling, h.unflatten(0, (-1, W1.shape[1]))).flatten(1, 2)
        return dropped(p, y.reshape(*x.shape[:channels], *y.shape[1:]))


def factors(p: View) -> tuple[Tensor, Tensor]:
    """W1 `[j, m]` and W2 `[k, n, *kernel]`, written out where they are products."""
    held = vars(p)
    W1 = p.lokr_w1 if "lokr_w1" in held else p.lokr_w1_a @ p.lokr_w1_b
    if "lokr_w2" in held:
        return W1, p.lokr_w2
    W2 = core(p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b) if "lokr_t2" in held else p.lokr_w2_a @ p.lokr_w2_b
    return W1, W2.reshape(*p.second, *p.site.kernel)


def shifted(p: View) -> bool:
    """Whether the format means the product along other axes: a whole W2 `[k, n, kernel]` meets W1 at its last two."""
    return len(p.site.kernel) == 1 and "lokr_w2" in vars(p)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `size`: `factor` first if it divides, else the largest divisor up to it and the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = min(math.isqrt(size), size if factor < 0 else factor)
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first
