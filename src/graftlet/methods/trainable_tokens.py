# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens: a few rows of an embedding or of an output head trained.   W'[i] = row_i  for the chosen tokens i

The rows are whole new rows, `[tokens, dim]`, not differences. Layers that share their weight share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PeftConfig, Targets
from ..core.method import Holder, Rewrite, Spec, Stage, View, Weights
from ..core.target import walk
from ..core.tensors import share
from ..errors import ConfigError, listing
from ..registry import method
from ..weights.site import Conv1D, Embedding, Linear, Site

ROWS = "trainable_tokens_delta"


@dataclass(kw_only=True)
class TrainableTokensConfig(Targets, PeftConfig):
    """Trainable tokens.

    Args:
        token_indices: the tokens whose rows are trained.
        target_modules: embeddings or heads; None takes the model's input embedding.
        init_weights: True (the rows as they are) or False (random).
    """

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def check(self) -> None:
        low = [i for i in self.token_indices if i < 0]
        self.require(not low, f"token_indices has {listing(low)}; a token is 0 or more.")
        twice = sorted({i for i in self.token_indices if self.token_indices.count(i) > 1})
        self.require(not twice, f"token_indices names {listing(twice)} more than once.")


@method("trainable_tokens", TrainableTokensConfig, sites=(Embedding, Linear, Conv1D))
class TrainableTokens(Rewrite):
    law = "chain"
    follows_ties = True
    saves_embedding = False

    def complete(self, config: PeftConfig, model: nn.Module) -> None:
        if config.target_modules is None and callable(ask := getattr(model, "get_input_embeddings", None)):
            config.target_modules = next((p.path for p in walk(model) if p.bare is ask()), None)

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, TrainableTokensConfig)
        return {"replaces": list(config.token_indices)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        vocabulary, dim = site.shape[::-1] if isinstance(site, Embedding) else site.shape
        beyond = [i for i in p.token_indices if i >= vocabulary]
        if beyond:
            raise ConfigError(
                f"token_indices has {listing(beyond)}, but {p.key!r} has {vocabulary} tokens, from 0 up. Where tokens "
                f"were added, call model.resize_token_embeddings({max(beyond) + 1}), or more, first."
            )
        tokens = Spec((len(p.token_indices),), trainable=False, dtype=torch.int64, saved=False, persistent=False)
        return {ROWS: Spec((len(p.token_indices), dim)), "tokens": tokens}

    def init(self, p: View) -> None:
        p.tokens.copy_(torch.tensor(p.token_indices, dtype=torch.int64))
        if p.init_weights:
            W = p.site.read()[0]
            p.trainable_tokens_delta.copy_((W.T if isinstance(p.site, Embedding) else W)[p.tokens])
        else:
            p.trainable_tokens_delta.normal_()

    def derived(self, config: PeftConfig) -> bool:
        return True  # the tokens stand in the config, not in the file

    def link(self, layers: Mapping[str, Holder], adapter: str) -> None:
        first: dict[tuple[object, ...], Holder] = {}
        for layer in layers.values():
            p = layer.view(adapter)
            share(first.setdefault((id(p.site.weight), *p.replaces), layer), layer, adapter, ROWS)

    def join(self, p: View, others: list[View]) -> None:
        for other in others:
            both = sorted(set(p.token_indices) & set(vars(other).get("replaces", ())))
            if both:
                raise ConfigError(
                    f"two active adapters replace the rows of tokens {listing(both)} on {p.key!r}; only one row can "
                    "stand there. Activate one of them, or train disjoint tokens."
                )

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        dim = 1 if isinstance(p.site, Embedding) else 0
        rows = p.trainable_tokens_delta.to(W.dtype)
        return W.index_copy(dim, p.tokens, rows.T if dim else rows), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """The output as it was, but for the chosen tokens: the weight is not copied."""
        y = before(x)
        if not p.replaces:
            return y
        if isinstance(p.site, Embedding):
            return looked_up(x, y, p)
        bias = before.weight()[1] if p.site.has_bias else None
        logits = F.linear(p.cast(x), p.trainable_tokens_delta, None if bias is None else bias[p.tokens].to(p.dtype))
        return y.to(logits.dtype).index_copy(-1, p.tokens, logits)


def looked_up(x: Tensor, y: Tensor, p: View) -> Tensor:
    """The rows y of tokens x, with the trained rows in place of the chosen tokens'."""
    tokens, order = p.tokens.sort()
    place = torch.searchsorted(tokens, x).clamp(max=len(p.replaces) - 1)
    rows = p.trainable_tokens_delta[order[place]]
    scale = cast(Embedding, p.site).scale
    rows = rows if scale is None else rows * scale
    return torch.where((tokens[place] == x).unsqueeze(-1), rows, y)
