# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT: a second state through the blocks.   h += a W_up W_down (h - s),   s <- (1 - g) s + g T(h'),   g = sigmoid(G(h'))

A small decoder of the base's kind gives the first s. Block by block, what sets h apart from s is put into the block's input;
from its output h', two small networks make the next s: T a candidate, and G how much of it. The small decoder learns its own
task along, by the base's head on the first s.
"""

from __future__ import annotations

import copy as copying
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Excludes, Layers, PeftConfig, Saves, Targets, TaskType
from ..core.around import Block, Held
from ..core.context import Call, current, using
from ..core.host import bare, check_known
from ..core.method import Spec
from ..core.prompt import CACHES, IGNORED
from ..errors import CallError, UnsupportedLayerError, UnsupportedOptionError
from ..registry import method
from .parts.heads import classified, head_name, last
from .parts.mirror import block_paths, decoder_of, mirror, standalone, takes, width_of
from .parts.paired import cache_in, follower, pair

BACKBONE, PROJECTION, HEAD = "shadow_backbone", "shadow_projection", "shadow_head"
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(kw_only=True)
class ShadowConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """ShadowPEFT.

    Args:
        target_modules: whole blocks; None: all of the decoder's.
        r: of W_up and W_down. shadow_alpha: a. shadow_dropout: on h - s. init_weights: W_up starts at zero.
        shadow_model: "mirror": a decoder like the base's, of one layer unless the sizes say more.
        shadow_num_hidden_layers, shadow_hidden_size, shadow_num_attention_heads, shadow_intermediate_size: its sizes; the
            base's unless given.
        share_embeddings: it reads the base's embeddings, where it is as wide. update_hidden_size: of T and G; r unless given.
        auxiliary_loss_weight: of its own loss, in training.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    def check(self) -> None:
        sizes = [f"shadow_{name}" for name in SIZES]
        for name in ("r", "update_hidden_size", *sizes):
            value = getattr(self, name)
            self.require(value is None or value > 0, f"{name}={value}; a positive number is needed.")
        self.require(
            0 <= self.shadow_dropout < 1, f"shadow_dropout={self.shadow_dropout}; allowed: 0 up to, not with, 1."
        )
        weight = self.auxiliary_loss_weight
        self.require(weight >= 0, f"auxiliary_loss_weight={weight}; 0 or more is needed.")
        if self.shadow_model == "mirror":
            return
        given = [name for name in sizes if getattr(self, name) is not None]
        self.require(
            not given, f"shadow_model={self.shadow_model!r} has sizes of its own; leave out {', '.join(given)}."
        )
        raise UnsupportedOptionError(f"shadow_model={self.shadow_model!r} is not available; only 'mirror' is.")


@method("shadow", ShadowConfig)
class Shadow(Block):
    unmergeable = "what it adds depends on the input and on a second state"
    boxed = True
    controls = ("unload_shadow",)

    # what an adapter has

    def complete(self, config: PeftConfig, model: nn.Module) -> None:
        decoder_of(model)
        if config.target_modules is None:
            config.target_modules = block_paths(model)

    def params(self, block: nn.Module, config: PeftConfig, model: nn.Module) -> dict[str, Spec]:
        assert isinstance(config, ShadowConfig)
        if not any(True for _ in block.children()):
            raise UnsupportedLayerError(f"SHADOW cannot adapt a {type(block).__name__}: it works on whole blocks.")
        d, r = width_of(getattr(model, "config", None)), config.r
        inner = config.update_hidden_size or r
        shapes = {"shadow_down.weight": (r, d), "shadow_up.weight": (d, r)}
        for net in ("shadow_update_transform", "shadow_update_gate"):
            for place, outer, within in ((0, inner, d), (2, d, inner)):
                shapes |= {f"{net}.{place}.weight": (outer, within), f"{net}.{place}.bias": (outer,)}
        return {name: Spec(shape, disk=name.replace(".", ".default.", 1)) for name, shape in shapes.items()}

    def init(self, tensors: dict[str, Tensor], config: PeftConfig) -> None:
        assert isinstance(config, ShadowConfig)
        bound = 0.0
        for tensor in tensors.values():
            bound = 1 / math.sqrt(tensor.shape[1]) if tensor.dim() == 2 else bound  # a bias comes after its weight
            tensor.uniform_(-bound, bound)
        if config.init_weights:
            tensors["shadow_up.weight"].zero_()

    def networks(self, config: PeftConfig, model: nn.Module) -> dict[str, nn.Module]:
        assert isinstance(config, ShadowConfig)
        depth, width, heads, inner = (getattr(config, f"shadow_{name}") for name in SIZES)
        made = {BACKBONE: mirror(model, depth or 1, width, inner, heads)}
        wide, kept = width_of(getattr(model, "config", None)), next(made[BACKBONE].parameters())
        if shares(config, made[BACKBONE], model):
            made[BACKBONE]._modules.pop("embed_tokens", None)
        if (width or wide) != wide:
            made[PROJECTION] = nn.Linear(width, wide, bias=False, device=kept.device, dtype=kept.dtype)
        if config.task_type == TaskType.SEQ_CLS and (name := head_name(model)):
            made[HEAD] = copying.deepcopy(bare(model.get_submodule(name)))
        return made

    # what an adapter does

    def call(self, p: Held, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        held = current()
        h = args[0] if args else kwargs["hidden_states"]
        s = None if held is None else held.trail.get((p.adapter, p.number))
        if held is None or s is None or s.shape[:-1] != h.shape[:-1]:
            raise CallError(
                f"a block of adapter {p.adapter!r} was called with {tuple(h.shape)} and no second state for it, which "
                "begins where the whole model is called: call the PeftModel, or disable the adapter."
            )
        h = injected(p, h, s.to(h.device))
        output = block(h, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": h})
        out = output[0] if isinstance(output, tuple) else output
        held.trail[p.adapter, p.number + 1] = updated(p, out, s.to(out.device))
        return output

    def around(self, p: Held, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        held = current() or Call()
        if held.rows is not None:
            return model(*args, **kwargs)  # the blocks say why not
        first, cache = started(p, model, kwargs.get("input_ids", args[0] if args else None), kwargs)
        with using(replace(held, trail={(p.adapter, 0): first})):
            outputs = model(*args, **kwargs)
        own = cache_in({name: getattr(outputs, name, None) for name in CACHES})
        if cache is not None and own is not None:
            pair(own, p.adapter, cache)
        loss = None if getattr(outputs, "loss", None) is None else own_loss(p, model, first, kwargs)
        if loss is not None:
            outputs.shadow_loss = loss.detach()
            if p.training and p.config.auxiliary_loss_weight:
                outputs.loss = outputs.loss + p.config.auxiliary_loss_weight * loss.to(outputs.loss)
        return outputs

    def unload_shadow(
        self, p: Held, model: nn.Module, adapter_name: str | None = None, copy: bool = False
    ) -> nn.Module:
        """The small decoder as a model of the base's class, with the head: it works without the base.

        It shares its tensors with the adapter, and its embeddings and head with the base, unless `copy`.
        """
        check_known([adapter_name or p.adapter], list(p.configs))
        p = replace(p, adapter=adapter_name or p.adapter)
        backbone, projection = p.network(BACKBONE), p.network(PROJECTION)
        assert backbone is not None
        heads = {}
        if (name := head_name(model)) is not None:
            head = p.network(HEAD) or model.get_submodule(name)
            heads[name] = head if projection is None else nn.Sequential(projection, head)
        made = standalone(model, backbone, heads, shares(p.config, backbone, model))
        return copying.deepcopy(made) if copy else made


def shares(config: ShadowConfig, backbone: nn.Module, model: nn.Module) -> bool:
    """Whether the small decoder reads the base's embeddings."""
    same = config.shadow_hidden_size in (None, width_of(getattr(model, "config", None)))
    return config.share_embeddings and same and takes(backbone, ("inputs_embeds",)) is not None


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
    logits = model.get_output_embeddings()(first)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORED)
