# SPDX-License-Identifier: Apache-2.0
"""Cartridge: a trained key-value cache, its first tokens frozen (arXiv 2506.06266).   past_key_values = reshape([K ; T])

K `[frozen tokens, layers * 2 * heads * size]` holds the attention still, T has the rest. It usually starts from the cache
that a text leaves (`initialize_kv_prefix_from_text`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...config import PromptLearningConfig
from ...core.prompt import ROWS, Cache
from ...registry import method


@dataclass(kw_only=True)
class CartridgeConfig(PromptLearningConfig):
    """A trained key-value cache.

    Args:
        num_virtual_tokens: its length. num_frozen_tokens: how many of its first tokens do not learn.
    """

    num_frozen_tokens: int = 1

    def check(self) -> None:
        frozen, tokens = self.num_frozen_tokens, self.num_virtual_tokens
        self.require(frozen >= 0, f"num_frozen_tokens={frozen}; it cannot be negative.")
        enough = tokens is None or frozen <= tokens
        self.require(enough, f"num_frozen_tokens={frozen} of num_virtual_tokens={tokens}; at most all of them.")


@method("cartridge", CartridgeConfig)
class CartridgeEncoder(Cache):
    """The cache's two parts."""

    frozen: ClassVar[tuple[str, ...]] = ("frozen_embedding",)

    def __init__(self, config: CartridgeConfig, words: nn.Module, loading: bool = False) -> None:
        super().__init__()
        tokens, dim, layers = config.num_virtual_tokens, config.token_dim, config.num_layers
        assert tokens is not None
        assert dim is not None
        assert layers is not None
        self.num_frozen_tokens, width = config.num_frozen_tokens, layers * 2 * dim
        self.frozen_embedding = None
        if self.num_frozen_tokens:
            self.frozen_embedding = nn.Parameter(torch.randn(self.num_frozen_tokens, width), requires_grad=False)
        self.trainable_embedding = nn.Parameter(torch.randn(tokens - self.num_frozen_tokens, width))

    def rows(self) -> Tensor:
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def assign(self, given: Mapping[str, Tensor]) -> None:
        if ROWS in given:
            rows = given[ROWS]
            self.trainable_embedding.copy_(rows[self.num_frozen_tokens :])
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(rows[: self.num_frozen_tokens])
