# SPDX-License-Identifier: Apache-2.0
"""MiSS: matrix shard sharing (arXiv 2409.15371).   dW[o, i] = D[i mod r, o];   bat: W' = W + W M + M in r x r blocks

D is `[r, out]`: inputs r apart share their weights, so y += D^T (sum of the input's slices of length r). "mini": D is
`[r, mini_r]`, repeated over the outputs. "bat": one M `[r, r]` for each r outputs, which multiplies W's blocks there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ..config import Excludes, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Method, Rewrite, Spec, Stage, View, Weights
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import check_dropout, input_dropout
from .parts.low_rank import kaiming, shaped


@dataclass(kw_only=True)
class MissConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """MiSS.

    Args:
        r: how far apart inputs share their weights. mini_r: for "mini", how many outputs have weights of their own.
        miss_dropout: dropout on the adapter's input.
        init_weights: True (no change at first), "mini" or "bat" (the same, in those forms), or False (random).
        bias: train the base's biases: "none", "all", or "miss_only" (of adapted layers).
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: str = "none"

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.mini_r > 0, f"mini_r={self.mini_r}; a positive number is needed.")
        self.require(0 <= self.miss_dropout < 1, f"miss_dropout={self.miss_dropout}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "miss_only"), f"bias={self.bias!r}; allowed: none, all, miss_only.")


@method("miss", MissConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class MiSS(Delta):
    dropout = "miss_dropout"

    def pick(self, site: Site, config: PeftConfig, key: str) -> Method:
        assert isinstance(config, MissConfig)
        return MiSSBat() if config.init_weights == "bat" else self

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, MissConfig)
        if config.r > site.columns:
            raise ConfigError(f"r={config.r} exceeds the {site.columns} inputs of {key!r}; lower it.")
        if config.init_weights == "mini" and site.features_out % config.mini_r:
            raise ConfigError(f"mini_r={config.mini_r} must divide the {site.features_out} outputs of {key!r}.")
        return {"miss_dropout": input_dropout(site, key, "miss_dropout", config.miss_dropout)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"miss_block": Spec((p.r, p.mini_r if p.init_weights == "mini" else site.features_out))}

    def init(self, p: View) -> None:
        if p.init_weights:
            p.miss_block.zero_()
        else:
            kaiming(p.miss_block, p.site.stack)

    def delta(self, p: View) -> Tensor:
        slices = -(-p.site.columns // p.r)
        return shaped(p.site, whole(p).T.repeat(1, slices)[:, : p.site.columns])

    def update(self, p: View, x: Tensor) -> Tensor:
        if p.site.kernel or not x.is_floating_point():
            return super().update(p, x)
        missing = -x.shape[-1] % p.r
        even = F.pad(x, (0, missing)) if missing else x  # to fill up with nothing is to copy
        return even.unflatten(-1, (-1, p.r)).sum(-2) @ whole(p)


class MiSSBat(Rewrite):
    """W' = W + W M + M, over each r x r block of W, with one M for each r outputs."""

    law = "chain"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, MissConfig)
        check_dropout(site, key, "miss_dropout", config.miss_dropout)
        if site.columns % config.r or site.features_out % config.r:
            raise ConfigError(
                f"init_weights='bat' needs an r that divides the {site.columns} inputs and {site.features_out} outputs of "
                f"{key!r}; r={config.r} was given."
            )
        return {"miss_dropout": input_dropout(site, key, "miss_dropout", config.miss_dropout)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"miss_block": Spec((site.features_out // p.r, p.r, p.r))}

    def init(self, p: View) -> None:
        p.miss_block.zero_()

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        M = p.miss_block[:, None]
        blocks = W.flatten(1).unflatten(1, (-1, p.r)).unflatten(0, (-1, p.r)).transpose(1, 2)  # [out / r, in / r, r, r]
        change = (blocks @ M + M).transpose(1, 2).flatten(0, 1).flatten(1)
        return W + change.reshape(W.shape), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        return super().forward(p, p.miss_dropout(x), before)


def whole(p: View) -> Tensor:
    """D `[r, out]`, where it is repeated written out."""
    times = p.site.features_out // p.miss_block.shape[1]
    return p.miss_block if times == 1 else p.miss_block.repeat(1, times)
