# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: full-rank updates from random bases (arXiv 2502.00987).   dW = s Σ Bj diag(λj) A diag(γj),   s = alpha / r

The bases Bj `[max, r]`, as many as make the rank full, and A `[r, min]` are random, frozen and shared by all layers. A
layer's own are λ `[r, n]` and γ `[n, min]`. Where a layer has more inputs than outputs, its dW is the transpose. The
format lays out A's n r rows by rank and B's columns by base, and multiplies them as they stand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Spec, View
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import LowRank


@dataclass(kw_only=True)
class RandLoraConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """RandLoRA.

    Args:
        r: the rank of a base; the smaller it is, the more bases and the more parameters.
        projection_prng_key: the seed of the bases. save_projection: write them into the file too, so that they do not
            depend on the random generator that reads it.
        sparse: bases of -1, 0 and 1, a sixth of each sign. very_sparse: fewer, 1 / sqrt(min) in all.
        randlora_alpha: dW is multiplied by randlora_alpha / r. randlora_dropout: dropout on the adapter's input.
        init_weights: True (zero λ: no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "randlora_only" (of adapted layers).
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True

    def check(self) -> None:
        rate, biases = self.randlora_dropout, ("none", "all", "randlora_only")
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(0 <= rate < 1, f"randlora_dropout={rate}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in biases, f"bias={self.bias!r}; allowed: {', '.join(biases)}.")


@method("randlora", RandLoraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class RandLoRA(LowRank):
    dropout = "randlora_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, RandLoraConfig)
        return {
            "scaling": config.randlora_alpha / config.r,
            "bases": math.ceil(min(site.features_out, site.columns) / config.r),
            "randlora_dropout": input_dropout(site, key, "randlora_dropout", config.randlora_dropout),
        }

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, RandLoraConfig)
        sizes = max(s.features_out for s in sites.values()), max(s.columns for s in sites.values())
        shapes = {
            "randlora_A": (config.r, 1, min(sizes)),
            "randlora_B": (max(sizes), math.ceil(min(sizes) / config.r), config.r),
        }
        kept = config.save_projection
        return {name: Spec(shape, trainable=False, saved=kept, persistent=kept) for name, shape in shapes.items()}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(config, RandLoraConfig)
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        A, B = tensors["randlora_A"], tensors["randlora_B"]
        if config.sparse or config.very_sparse:
            share = 1 / (2 * math.sqrt(A.shape[2])) if config.very_sparse else 1 / 6
            A.copy_(ternary(A.shape, share, generator))
            B.copy_(ternary(B.shape, share, generator))
        else:
            A.copy_(dense(A.shape, generator))
            B.copy_(dense((B.shape[1], B.shape[0], B.shape[2]), generator).transpose(0, 1))

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        small = min(site.features_out, site.columns)
        return {"randlora_lambda": Spec((p.r, p.bases)), "randlora_gamma": Spec((p.bases, small))}

    def init(self, p: View) -> None:
        p.randlora_gamma.fill_(1 / max(p.randlora_gamma.shape[-2:]))
        if p.init_weights:
            p.randlora_lambda.zero_()
        else:
            p.randlora_lambda.normal_()

    def unpack(self, p: View, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Files may hold what is shared once more at every layer."""
        return {key: tensor for key, tensor in given.items() if key not in ("randlora_A", "randlora_B")}

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        small, large = sorted((p.site.features_out, p.site.columns))
        A, B = p.randlora_A[:, :, :small], p.randlora_B[:large, : p.bases]
        if A.shape[2] < small or B.shape[0] < large or B.shape[1] < p.bases:
            raise ConfigError(f"the shared bases {tuple(p.randlora_B.shape)} are too small for {p.key!r}.")
        down = (p.randlora_lambda[:, :, None] * A * p.randlora_gamma).flatten(0, 1)
        up = B.flatten(1) * p.scaling
        return (up.T, down.T) if p.site.columns > p.site.features_out else (down, up)


def dense(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Evenly spread numbers of standard deviation 1. They are drawn in bfloat16, which the format fixes."""
    start = torch.empty(shape, dtype=torch.bfloat16)
    bound = 1 / math.sqrt(shape[-1])
    start.uniform_(-bound, bound, generator=generator)
    return start / start.std()


def ternary(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """-1, 0 and 1, each sign with this share, over their standard deviation."""
    drawn = torch.rand(shape, generator=generator)
    signs = (drawn > 1 - share).float() - (drawn < share).float()
    return signs / signs.std()
