# SPDX-License-Identifier: Apache-2.0
"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454).   dW = diag(b) B diag(d) A

A `[r, in]` and B `[out, r]` are random, frozen and shared by all layers: each layer uses the first rows and columns of
one pair as large as the largest layer. A layer's own are d `[r]` and b `[out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Conv1D, Linear, Site


@dataclass(kw_only=True)
class VeraConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """VeRA.

    Args:
        r: the rank of the shared pair. d_initial: what d starts at.
        projection_prng_key: the seed of the shared pair. save_projection: write the pair into the file too, so that it
            does not depend on the random generator that reads it.
        vera_dropout: dropout on the adapter's input. bias: "none", "all", or "vera_only".
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(0 <= self.vera_dropout < 1, f"vera_dropout={self.vera_dropout}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "vera_only"), f"bias={self.bias!r}; allowed: none, all, vera_only.")


@method("vera", VeraConfig, sites=(Linear, Conv1D), prefix="vera_lambda_")
class VeRA(Delta):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, VeraConfig)
        return {"vera_dropout": nn.Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity()}

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, VeraConfig)
        widest = max(site.features_in for site in sites.values())
        tallest = max(site.features_out for site in sites.values())
        shapes = {"vera_A": (config.r, widest), "vera_B": (tallest, config.r)}
        kept = config.save_projection
        return {name: Spec(shape, trainable=False, saved=kept, persistent=kept) for name, shape in shapes.items()}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(config, VeraConfig)
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name in ("vera_A", "vera_B"):
            start = torch.empty(tensors[name].shape)
            tensors[name].copy_(nn.init.kaiming_uniform_(start, generator=generator))

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"vera_lambda_b": Spec((site.features_out,)), "vera_lambda_d": Spec((p.r,))}

    def init(self, p: View) -> None:
        p.vera_lambda_d.fill_(p.d_initial)
        if p.init_weights:
            p.vera_lambda_b.zero_()
        else:
            p.vera_lambda_b.normal_()

    def drop(self, p: View, x: Tensor) -> Tensor:
        return p.vera_dropout(x)

    def delta(self, p: View) -> Tensor:
        A, B = self._pair(p)
        return p.vera_lambda_b[:, None] * (B * p.vera_lambda_d) @ A

    def update(self, p: View, x: Tensor) -> Tensor:
        A, B = self._pair(p)
        h = p.site.op(x, A) * p.vera_lambda_d
        return p.site.mix(h, B) * p.vera_lambda_b

    def _pair(self, p: View) -> tuple[Tensor, Tensor]:
        A, B = p.vera_A, p.vera_B
        if A.shape[1] < p.site.features_in or B.shape[0] < p.site.features_out:
            raise ConfigError(f"the shared projections {tuple(A.shape)}, {tuple(B.shape)} are too small for {p.key!r}.")
        return A[:, : p.site.features_in], B[: p.site.features_out]
