# SPDX-License-Identifier: Apache-2.0
"""A random pair of frozen matrices that all layers share, each using the first rows and columns of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Site
from .dropout import input_dropout
from .low_rank import LowRank


@dataclass(kw_only=True)
class SharedPairConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """What the configs of these methods have in common."""

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True

    def check(self) -> None:
        name = self.peft_type_name.lower()
        rate, biases = getattr(self, f"{name}_dropout"), ("none", "all", f"{name}_only")
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(0 <= rate < 1, f"{name}_dropout={rate}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in biases, f"bias={self.bias!r}; allowed: {', '.join(biases)}.")


class SharedPair(LowRank):
    """dW = diag(b) B diag(d) A, with a layer's own b `[out]` and d `[r]`.

    name: what the tensors' names begin with. heads: how many A's there are, one above the other, each with its own d.
    """

    name: ClassVar[str]
    heads: ClassVar[int] = 1

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        return {self.dropout: input_dropout(site, key, self.dropout, getattr(config, self.dropout))}

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, SharedPairConfig)
        widest = max(site.columns for site in sites.values())
        tallest = max(site.features_out for site in sites.values())
        shapes = {"A": (config.r * self.heads, widest), "B": (tallest, config.r)}
        kept = config.save_projection
        return {f"{self.name}_{n}": Spec(s, trainable=False, saved=kept, persistent=kept) for n, s in shapes.items()}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(config, SharedPairConfig)
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for tensor in tensors.values():
            tensor.copy_(nn.init.kaiming_uniform_(torch.empty(tensor.shape), generator=generator))

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        shapes = {"b": (site.features_out,), "d": (p.r * self.heads,)}
        return {f"{self.name}_lambda_{n}": Spec(s) for n, s in shapes.items()}

    def init(self, p: View) -> None:
        b, d = self.own(p)
        d.fill_(p.d_initial)
        if p.init_weights:
            b.zero_()
        else:
            b.normal_()

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        (b, d), (A, B) = self.own(p), self.pair(p)
        return A[: p.r], b[:, None] * B * d[: p.r]

    def own(self, p: View) -> tuple[Tensor, Tensor]:
        """b and d."""
        return vars(p)[f"{self.name}_lambda_b"], vars(p)[f"{self.name}_lambda_d"]

    def pair(self, p: View) -> tuple[Tensor, Tensor]:
        """The layer's part of A and B. Raises `ConfigError` where they come from smaller layers."""
        A, B = vars(p)[f"{self.name}_A"], vars(p)[f"{self.name}_B"]
        if A.shape[1] < p.site.columns or B.shape[0] < p.site.features_out:
            raise ConfigError(f"the shared projections {tuple(A.shape)}, {tuple(B.shape)} are too small for {p.key!r}.")
        return A[:, : p.site.columns], B[: p.site.features_out]
