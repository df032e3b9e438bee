# SPDX-License-Identifier: Apache-2.0
"""A second state beside a decoder's own: how it starts, what it puts into a block, how it goes on, and what it learns alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...config import TaskType
from ...core.around import Held
from ...core.prompt import CACHES, IGNORED
from ...errors import CallError
from .heads import classified, kept, last, targets
from .mirror import takes, width_of
from .paired import cache_in, follower

MIRROR = "mirror"
"""The small decoder is one like the base's, not one that was trained elsewhere."""

BACKBONE, PROJECTION, HEAD = "shadow_backbone", "shadow_projection", "shadow_head"


def shares(config: Any, backbone: Any, model: nn.Module) -> bool:
    """Whether the small decoder reads the base's embeddings: one of the base's kind and width that can, where that is asked."""
    if not config.share_embeddings or config.shadow_model != MIRROR:
        return False
    same = width_of(backbone.config) == width_of(getattr(model, "config", None))
    return same and takes(backbone, ("inputs_embeds",)) is not None


def started(p: Held, model: Any, ids: Tensor | None, given: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The first state `[rows, tokens, width]`, and the small decoder's cache."""
    backbone, projection = p.network(BACKBONE), p.network(PROJECTION)
    assert backbone is not None
    cache, embeds, use = cache_in(given), given.get("inputs_embeds"), given.get("use_cache")
    past = follower(cache, p.adapter)
    if past is None and cache is not None and cache.get_seq_length():
        raise CallError(f"the cache comes from calls without adapter {p.adapter!r}; begin a new one with it.")
    if ids is None and embeds is None:
        raise CallError(f"adapter {p.adapter!r} begins with input_ids or inputs_embeds, and the call has neither.")
    if embeds is None and shares(p.config, backbone, model):
        embeds = model.get_input_embeddings()(ids)
    options = {n: given[n] for n in ("attention_mask", "position_ids") if given.get(n) is not None}
    options["use_cache"] = bool(getattr(model.config, "use_cache", False) if use is None else use)
    if (name := takes(backbone, CACHES)) is not None:
        options[name] = past
    source = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    out = backbone(**source, **options, return_dict=True)
    state = out.last_hidden_state
    made = cache_in({name: getattr(out, name, None) for name in CACHES})
    return state if projection is None else projection(state), made


def injected(p: Held, h: Tensor, s: Tensor) -> Tensor:
    """The block's input, with what sets it apart from s."""
    down, up = p["shadow_down.weight"], p["shadow_up.weight"]
    apart = F.dropout((h - s).to(down.dtype), p.config.shadow_dropout, p.training)
    return h + (p.config.shadow_alpha * F.linear(F.linear(apart, down), up)).to(h.dtype)


def updated(p: Held, h: Tensor, s: Tensor) -> Tensor:
    """The next state, from the block's output."""
    x = h.to(p["shadow_down.weight"].dtype)
    gate = network(p, "shadow_update_gate", x).sigmoid()
    return ((1 - gate) * s.to(x.dtype) + gate * network(p, "shadow_update_transform", x)).to(s.dtype)


def network(p: Held, name: str, x: Tensor) -> Tensor:
    """Two linear layers with GELU between them."""
    x = F.gelu(F.linear(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"]))
    return F.linear(x, p[f"{name}.2.weight"], p[f"{name}.2.bias"])


def own_loss(p: Held, model: Any, first: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """The small decoder's own loss; None where the task has none."""
    labels, head = given.get("labels"), p.network(HEAD)
    if labels is None:
        return None
    if head is not None:
        return classified(head(last(first, given.get("attention_mask"))), labels)
    if p.config.task_type != TaskType.CAUSAL_LM:
        return None
    logits = model.get_output_embeddings()(kept(first, given.get("logits_to_keep", 0))).flatten(0, 1).float()
    following = targets(labels, given.get("shift_labels")).to(logits.device)
    total = F.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum")
    counted = given.get("num_items_in_batch")  # of several batches whose gradients are added up
    return total / ((following != IGNORED).sum() if counted is None else counted)
