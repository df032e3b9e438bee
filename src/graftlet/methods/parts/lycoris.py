# SPDX-License-Identifier: Apache-2.0
"""What the methods of the LyCORIS family share: ranks and alphas a layer, and dropout on what the adapter gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...config import Excludes, Layers, PeftConfig, Saves, Targets
from ...core.method import View
from ...core.target import by_pattern
from ...weights.site import Site
from .dropout import check_dropout


@dataclass(kw_only=True)
class LycorisConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """LyCORIS.

    Args:
        r: the rank. alpha: dW is multiplied by alpha / r. rank_pattern, alpha_pattern: others for layers whose path ends
            in a key (a regex).
        rank_dropout: the share of outputs that the adapter leaves alone in a training step. module_dropout: the share of
            training steps in which it leaves a layer alone.
        use_effective_conv2d: for kernels larger than 1, a core tensor between thin factors instead of flat kernels.
    """

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)

    def check(self) -> None:
        for name, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            self.require(rank > 0, f"rank {name}={rank}; a positive number is needed.")
        for name, rate in {"rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout}.items():
            self.require(0 <= rate < 1, f"{name}={rate}; allowed: 0 up to, not with, 1.")


def resolved(site: Site, config: LycorisConfig, key: str, rescale: bool) -> dict[str, Any]:
    """The settings of one layer."""
    check_dropout(site, key, "rank_dropout", config.rank_dropout)
    check_dropout(site, key, "module_dropout", config.module_dropout)
    r = by_pattern(config.rank_pattern, key, config.r)
    alpha = by_pattern(config.alpha_pattern, key, config.alpha)
    dropout = OutputDropout(config.rank_dropout, config.module_dropout, rescale)
    return {"r": r, "alpha": alpha, "scaling": alpha / r, "lycoris_dropout": dropout}


class OutputDropout(nn.Module):
    """Drops outputs of an adapter with probability `rank`, and all of them together with probability `module`.

    To drop an output is to drop the row of dW that makes it. rescale: by the share of outputs that are kept.
    """

    def __init__(self, rank: float, module: float, rescale: bool) -> None:
        super().__init__()
        self.rank, self.module, self.rescale = rank, module, rescale

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.rank:
            kept = (torch.rand(y.shape[-1], device=y.device) >= self.rank).to(y.dtype)
            y = y * (kept / kept.mean().clamp(min=1 / y.shape[-1]) if self.rescale else kept)
        if self.training and self.module:
            y = y * (torch.rand((), device=y.device) >= self.module)
        return y


def dropped(p: View, y: Tensor) -> Tensor:
    """What the adapter gives in this step."""
    idle = not p.training or not (p.rank_dropout or p.module_dropout)
    return y if idle else p.site.on_channels(p.lycoris_dropout, y)


def core(t: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """`[out, in, *kernel]` from a core tensor `[r, r, *kernel]` and factors `[r, out]`, `[r, in]`."""
    return torch.einsum("ij...,io,jn->on...", t, outer, inner)


def core_shape(site: Site, r: int) -> tuple[int, ...]:
    """A core tensor's shape; the format writes a one-dimensional kernel with a 1 behind it."""
    return (r, r, *site.kernel, *[1] * (len(site.kernel) == 1))
