# SPDX-License-Identifier: Apache-2.0
"""Uni-LoRA: one vector is all you need (arXiv 2506.00799).   dW = B A,   entries of A, B = θ[i] / sqrt(n_i)

θ is one trained vector for the whole model. Every entry of every A `[r, in]` and B `[out, r]` reads one place i of it;
n_i entries read the same. The places are shuffled by a seed and dealt out in the layers' order, A before B.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Spec, View
from ..core.tensors import check_places
from ..errors import DependencyError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import LowRank


@dataclass(kw_only=True)
class UniLoraConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """Uni-LoRA.

    Args:
        r: the rank. theta_d_length: the length of θ, which is all that is trained.
        proj_seed: the seed of the places. save_indices: save them too, so that they do not depend on who draws them.
        unilora_dropout: dropout on the adapter's input.
        init_theta_d_bound: θ starts evenly between its minus and plus; with init_weights=False it is normal.
        bias: train the base's biases: "none", "all", or "unilora_only" (of adapted layers).
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def check(self) -> None:
        rate, biases = self.unilora_dropout, ("none", "all", "unilora_only")
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.theta_d_length > 0, f"theta_d_length={self.theta_d_length}; a positive number is needed.")
        self.require(0 <= rate < 1, f"unilora_dropout={rate}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in biases, f"bias={self.bias!r}; allowed: {', '.join(biases)}.")


@method("unilora", UniLoraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class UniLoRA(LowRank):
    dropout = "unilora_dropout"

    exact_start = False

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, UniLoraConfig)
        return {"unilora_dropout": input_dropout(site, key, "unilora_dropout", config.unilora_dropout)}

    def deal(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
        assert isinstance(config, UniLoraConfig)
        deck, dealt = Deck(config.proj_seed, config.theta_d_length), {}
        for key, site in sites.items():
            dealt[key] = {"deck": deck, "first": deck.size}
            deck.size += config.r * (site.columns + site.features_out) * max(1, site.stack)
        return dealt

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, UniLoraConfig)
        return {"unilora_theta_d": Spec((config.theta_d_length,))}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(config, UniLoraConfig)
        theta = tensors["unilora_theta_d"]
        if config.init_weights:
            theta.uniform_(-config.init_theta_d_bound, config.init_theta_d_bound)
        else:
            theta.normal_()

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        for side, shape in {"A": (p.r, site.columns), "B": (site.features_out, p.r)}.items():
            for what, dtype in {"indices": torch.int64, "scales": torch.float32}.items():
                kept = p.save_indices
                specs[f"unilora_{what}_{side}"] = Spec(shape, False, dtype, saved=kept, persistent=kept)
        return specs

    def derived(self, config: PeftConfig) -> bool:
        assert isinstance(config, UniLoraConfig)
        return not config.save_indices

    def init(self, p: View) -> None:
        first = p.first
        for side in "AB":
            indices, scales = (vars(p)[f"unilora_{what}_{side}"] for what in ("indices", "scales"))
            places, counts = p.deck.deal(first, indices.numel())
            indices.copy_(places.reshape(indices.shape))
            scales.copy_(counts.reshape(scales.shape).rsqrt())
            first += indices.numel()

    def check_loaded(self, p: View) -> None:
        for indices in (p.unilora_indices_A, p.unilora_indices_B):
            check_places(indices, len(p.unilora_theta_d), "unilora_indices")

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        theta = p.unilora_theta_d
        return theta[p.unilora_indices_A] * p.unilora_scales_A, theta[p.unilora_indices_B] * p.unilora_scales_B


class Deck:
    """The places of all layers' entries: every place of θ as often as any other, but for one; shuffled when first asked for.

    It is forgotten once all of it has been dealt.
    """

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length, self.size, self.dealt = seed, length, 0, 0
        self.cards: Tensor | None = None

    def deal(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Some of the places, and how often each of them stands in the deck."""
        if self.cards is None:
            self.cards = self._shuffled()
            self.counts = self.cards.bincount(minlength=self.length).float()
        places = self.cards[first : first + count]
        self.dealt += count
        if self.dealt >= self.size:
            self.cards, self.dealt = None, 0
        return places, self.counts[places]

    def _shuffled(self) -> Tensor:
        try:
            numpy = importlib.import_module("numpy")
        except ImportError as error:
            raise DependencyError(
                "Uni-LoRA's places are drawn by numpy, as its format says: pip install numpy."
            ) from error
        draw = numpy.random.default_rng(self.seed)
        each, rest = divmod(self.size, self.length)
        more = draw.choice(self.length, size=rest, replace=False)
        cards = numpy.concatenate([numpy.repeat(numpy.arange(self.length), each), more])
        draw.shuffle(cards)
        return torch.from_numpy(cards)
