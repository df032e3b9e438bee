# SPDX-License-Identifier: Apache-2.0
"""CPT: context-aware prompt tuning, examples in front that move a little (arXiv 2410.17222).   P = E(ids) + D, |D_i| <= eps_i

D `[tokens, dim]` starts at zero and is projected back into its bounds at every step. The labels among the examples count in
the loss too, and may count the less the further back they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import PromptLearningConfig, TaskType
from ...core.prompt import IGNORED, ROWS, Prompt
from ...errors import CallError
from ...registry import method

KINDS = 4
"""Types of tokens, by their number's remainder: 1 an input's template, 2 an input, 3 an output's template, 0 a label. The
number 0 is none of them. The examples' numbers go on from one to the next."""

STILL = 1e-10
"""The bound of tokens that stay where they are."""

WIDTH = 2048
"""The size of embeddings for which the bounds are given; they grow with its root."""


@dataclass(kw_only=True)
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning, of causal language models.

    Args:
        cpt_token_ids: the examples' tokens (None: token 0). Their number is the prompt's length.
        cpt_tokens_type_mask: the type of each (None: 1): example k counts from 4k, so that 4k + 1 is its input's template,
            4k + 2 its input, 4k + 3 its output's template, 4k + 4 its label; 0 is a token of no type.
        cpt_mask: kept in the format; nothing reads it.
        opt_weighted_loss_type: "decay" lets a label count opt_loss_decay_factor times as much as the next one.
        opt_projection_epsilon, opt_projection_format_epsilon: how far inputs and templates may move, for embeddings of
            2048 entries.
        tokenizer_name_or_path: where the ids come from; nothing reads it.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def check(self) -> None:
        self.require(self.task_type == TaskType.CAUSAL_LM, "task_type must be CAUSAL_LM, for which the method is made.")
        ids = self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * len(ids))
            given = len(getattr(self, name))
            self.require(given == len(ids), f"{name} has {given} entries for {len(ids)} cpt_token_ids; one each.")
        self.require(bool(ids), "cpt_token_ids is empty; one token at least.")
        self.require(all(n >= 0 for n in [*ids, *(self.cpt_tokens_type_mask or [])]), "ids and types start from 0.")
        tokens = self.num_virtual_tokens
        self.require(
            tokens in (None, len(ids)), f"num_virtual_tokens={tokens}, but cpt_token_ids has {len(ids)}; leave it out."
        )
        self.num_virtual_tokens, self.num_transformer_submodules = len(ids), 1
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon", "opt_loss_decay_factor"):
            self.require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}; it cannot be negative.")


@method("cpt", CPTConfig)
class CPTEmbedding(Prompt):
    """The examples' embeddings, and how far each has moved."""

    takes: ClassVar[tuple[str, ...]] = ("input_type_mask", "labels")
    frozen: ClassVar[tuple[str, ...]] = ("embedding.",)
    types: Tensor
    bounds: Tensor

    def __init__(self, config: CPTConfig, words: Any, loading: bool = False) -> None:
        super().__init__()
        tokens, dim = config.num_virtual_tokens, config.token_dim
        assert tokens is not None
        assert dim is not None
        self.config = config
        self.embedding = nn.Embedding(tokens, dim)
        self.delta_embedding = nn.Embedding(tokens, dim)
        nn.init.zeros_(self.delta_embedding.weight)
        types = torch.tensor(config.cpt_tokens_type_mask)
        self.register_buffer("types", types, persistent=False)
        self.register_buffer("bounds", bounds(config, types, dim), persistent=False)
        if not loading:
            ids = torch.tensor(config.cpt_token_ids, device=words.weight.device)
            with torch.no_grad():
                self.embedding.weight.data = words(ids).to(torch.float32, copy=True)

    def rows(self) -> Tensor:
        delta = self.delta_embedding.weight
        if delta.requires_grad and torch.is_grad_enabled():
            with torch.no_grad():
                delta.copy_(self.projected())  # the step goes on from within the bounds
            moves = is_type(self.types, 1, 2, 3).unsqueeze(1)
            return self.embedding.weight + torch.where(moves, delta, delta.detach())
        return self.embedding.weight + self.projected()

    def projected(self) -> Tensor:
        """D, each row cut to its bound."""
        delta = self.delta_embedding.weight.detach()
        length = delta.norm(dim=1, keepdim=True)
        return delta * torch.where(length > 0, self.bounds / torch.maximum(length, self.bounds), 1.0)

    def saved(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return super().saved()

    def assign(self, given: Mapping[str, Tensor]) -> None:
        if ROWS in given:
            self.embedding.weight.copy_(given[ROWS])
            nn.init.zeros_(self.delta_embedding.weight)

    def finish(self, output: Any, given: Mapping[str, Any]) -> Any:
        if given.get("labels") is not None:
            output.loss = self.loss(output.logits, given["labels"], given.get("input_type_mask"))
        return output

    def loss(self, logits: Tensor, labels: Tensor, types: Tensor | None) -> Tensor:
        """The mean over all labels, the examples' and the call's own, each at its weight.

        logits: `[batch, tokens, words]` of prompt and input. labels, types: of the input (None: it is label throughout).
        """
        batch, device = len(labels), logits.device
        labels = labels.to(device)
        types = torch.full_like(labels, KINDS) if types is None else types.to(device).long()
        if types.shape != labels.shape:
            raise CallError(f"input_type_mask is {list(types.shape)}, labels are {list(labels.shape)}; one type each.")
        own = self.types.to(device)
        after = -(-int(own.max()) // KINDS) * KINDS  # the input is one more example
        types = torch.cat([own.expand(batch, -1), torch.where(types > 0, types + after, types)], 1)
        ids = torch.tensor(self.config.cpt_token_ids, device=device).expand(batch, -1)
        labels = torch.cat([ids, labels], 1).where(is_type(types, 0), IGNORED)[:, 1:]
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
        counted = labels != IGNORED
        return (each.view_as(labels) * self.weights(types[:, 1:]))[counted].mean()

    def weights(self, types: Tensor) -> Tensor:
        """How much each token counts, `[batch, tokens]`: a label less by the factor for every label after it."""
        if self.config.opt_weighted_loss_type == "none":
            return torch.ones_like(types, dtype=torch.float32)
        there = torch.zeros(len(types), int(types.max()) + 1, device=types.device)
        there.scatter_(1, types.where(is_type(types, 0), 0), 1.0)[:, 0] = 0
        after = there.flip(1).cumsum(1).flip(1) - there
        return self.config.opt_loss_decay_factor ** after.gather(1, types)


def is_type(types: Tensor, *kinds: int) -> Tensor:
    """Which tokens are of these kinds."""
    return (types > 0) & torch.isin(types % KINDS, torch.tensor(kinds, device=types.device))


def bounds(config: CPTConfig, types: Tensor, dim: int) -> Tensor:
    """How far each token may move, `[tokens, 1]`."""
    found, scale = torch.full(types.shape, STILL), (dim / WIDTH) ** 0.5
    found[is_type(types, 2)] = config.opt_projection_epsilon * scale
    found[is_type(types, 1, 3)] = config.opt_projection_format_epsilon * scale
    return found.unsqueeze(1)
