# SPDX-License-Identifier: Apache-2.0
"""TinyLoRA: adaptation with a few trained numbers (arXiv 2602.04118).   dW = B (v1 P1 + ... + vu Pu) A

A = sqrt(S) V^T `[r, in]` and B = U sqrt(S) `[out, r]` are W's largest singular directions, frozen, and so are the random
Pi `[r, r]`. The u numbers v are all that is trained; groups of layers share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Spec, View
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import LowRank


@dataclass(kw_only=True)
class TinyLoraConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """TinyLoRA.

    Args:
        r: the rank; no more than a weight's smaller side is used. u: how many numbers a group of layers trains.
        weight_tying: from 0 (each layer a group) to 1 (one group): the groups are the share 1 - weight_tying of the layers.
        projection_seed: the seed of the P's; each layer adds its number. save_projection: write them into the file too.
        init_weights: True (zeros: no change at first), "uniform" or False (evenly between -init_v_bound and it).
        tinylora_dropout: dropout on the adapter's input.
        bias: train the base's biases: "none", "all", or "tinylora_only" (of adapted layers).
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool | Literal["uniform"] = True

    def check(self) -> None:
        rate, biases = self.tinylora_dropout, ("none", "all", "tinylora_only")
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.u > 0, f"u={self.u}; a positive number is needed.")
        self.require(0 <= self.weight_tying <= 1, f"weight_tying={self.weight_tying}; allowed: 0 to 1.")
        self.require(0 <= rate < 1, f"tinylora_dropout={rate}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in biases, f"bias={self.bias!r}; allowed: {', '.join(biases)}.")


@method("tinylora", TinyLoraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class TinyLoRA(LowRank):
    dropout = "tinylora_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, TinyLoraConfig)
        return {
            "r": min(config.r, site.features_out, site.columns),
            "tinylora_dropout": input_dropout(site, key, "tinylora_dropout", config.tinylora_dropout),
        }

    def deal(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
        groups = count(config, len(sites))
        each = len(sites) // groups
        return {key: {"number": i, "group": str(min(i // each, groups - 1))} for i, key in enumerate(sites)}

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, TinyLoraConfig)
        return {f"tinylora_v.{group}": Spec((config.u,)) for group in range(count(config, len(sites)))}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(config, TinyLoraConfig)
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        for v in tensors.values():
            v.uniform_(-bound, bound)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        right, left = (p.r, site.columns), (site.features_out, p.r)
        if isinstance(site, Embedding):  # which the format sees the other way round
            right, left = (p.r, site.features_out), (site.columns, p.r)
        P = Spec((p.u, p.r, p.r), trainable=False, saved=p.save_projection, persistent=p.save_projection)
        return {"tinylora_A": Spec(right, trainable=False), "tinylora_B": Spec(left, trainable=False), "tinylora_P": P}

    def derived(self, config: PeftConfig) -> bool:
        assert isinstance(config, TinyLoraConfig)
        return not config.save_projection

    def init(self, p: View) -> None:
        W = p.site.read()[0].float()
        W = W.flatten(W.dim() - len(p.site.kernel) - 1)
        U, S, Vh = torch.linalg.svd(W.mT if isinstance(p.site, Embedding) else W, full_matrices=False)
        root = S[..., : p.r].sqrt()
        p.tinylora_A.copy_(root[..., None] * Vh[..., : p.r, :])
        p.tinylora_B.copy_(U[..., : p.r] * root[..., None, :])
        generator = torch.Generator("cpu").manual_seed(p.projection_seed + p.number)
        p.tinylora_P.copy_(torch.randn(p.tinylora_P.shape, generator=generator) / math.sqrt(p.r))

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        v = p.tinylora_v[p.group].to(p.tinylora_P.dtype)
        R = torch.einsum("u,urs->rs", v, p.tinylora_P)
        if isinstance(p.site, Embedding):
            return p.tinylora_B.T, p.tinylora_A.T @ R.T
        return p.tinylora_A, p.tinylora_B @ R


def count(config: PeftConfig, layers: int) -> int:
    """How many groups share their numbers."""
    assert isinstance(config, TinyLoraConfig)
    return max(1, round(layers * (1 - config.weight_tying)))
