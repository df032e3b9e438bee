# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning: trained keys and values before every layer's own (arXiv 2101.00190).   past_key_values = reshape(P)

P `[tokens, layers * 2 * heads * size]`, or a small network's output on `[tokens, dim]` while it trains
(`prefix_projection`); the file has P either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ...config import PromptLearningConfig
from ...core.prompt import Cache
from ...registry import method


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning.

    Args:
        num_virtual_tokens: the prefix's length.
        prefix_projection: train through a network of encoder_hidden_size (None: the keys' size).
        init_weights: "zero" for a prefix of zeros; None for a random one.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


@method("prefix_tuning", PrefixTuningConfig)
class PrefixEncoder(Cache):
    """The prefix, and the network that makes it while it trains."""

    def __init__(self, config: PrefixTuningConfig, words: nn.Module, loading: bool = False) -> None:
        super().__init__()
        tokens, dim, layers = config.num_virtual_tokens, config.token_dim, config.num_layers
        assert tokens is not None
        assert dim is not None
        assert layers is not None
        width = layers * 2 * dim
        self.prefix_projection = config.prefix_projection and not loading
        if self.prefix_projection:
            hidden = config.encoder_hidden_size or dim
            self.embedding = nn.Embedding(tokens, dim)
            self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
        else:
            self.embedding = nn.Embedding(tokens, width)
        if config.init_weights == "zero" and not loading:
            for parameter in (self.transform[-1] if self.prefix_projection else self.embedding).parameters():
                nn.init.zeros_(parameter)

    def rows(self) -> Tensor:
        return self.transform(self.embedding.weight) if self.prefix_projection else self.embedding.weight
