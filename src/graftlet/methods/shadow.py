# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT: a second state through the blocks.   h += a W_up W_down (h - s),   s <- (1 - g) s + g T(h'),   g = sigmoid(G(h'))

A small decoder of the base's kind gives the first s. Block by block, what sets h apart from s is put into the block's input;
from its output h', two small networks make the next s: T a candidate, and G how much of it. The small decoder learns its own
task along, by the base's head on the first s.
"""

from __future__ import annotations

import copy as copying
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..config import Excludes, Layers, PeftConfig, Saves, Targets, TaskType
from ..core.around import Block, Held
from ..core.context import Call, current, using
from ..core.host import bare, check_known
from ..core.method import Spec
from ..core.prompt import CACHES
from ..errors import CallError, UnsupportedLayerError
from ..registry import method
from .parts.heads import head_name
from .parts.mirror import beside, block_paths, decoder_of, mirror, standalone, width_of
from .parts.paired import cache_in, pair
from .parts.ready import ready
from .parts.second_state import BACKBONE, HEAD, MIRROR, PROJECTION, injected, own_loss, shares, started, updated

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(kw_only=True)
class ShadowConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """ShadowPEFT.

    Args:
        target_modules: whole blocks; None: all of the decoder's.
        r: of W_up and W_down. shadow_alpha: a. shadow_dropout: on h - s. init_weights: W_up starts at zero.
        shadow_model: "mirror": a decoder like the base's, of one layer unless the sizes say more. Otherwise a trained one, by
            its directory or repository, perhaps with a projection to the base's width; its embeddings stay as they are.
        shadow_num_hidden_layers, shadow_hidden_size, shadow_num_attention_heads, shadow_intermediate_size: its sizes; the
            base's unless given.
        share_embeddings: it reads the base's embeddings, where it is as wide. update_hidden_size: of T and G; r unless given.
        auxiliary_loss_weight: of its own loss, in training.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = MIRROR
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
        given = [name for name in sizes if getattr(self, name) is not None]
        self.require(
            self.shadow_model == MIRROR or not given,
            f"shadow_model={self.shadow_model!r} has sizes of its own; leave out {', '.join(given)}.",
        )


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

    def networks(self, config: PeftConfig, model: nn.Module, init: bool) -> dict[str, nn.Module]:
        assert isinstance(config, ShadowConfig)
        wide, projection = width_of(getattr(model, "config", None)), None
        if config.shadow_model == MIRROR:
            depth, width, heads, inner = (getattr(config, f"shadow_{name}") for name in SIZES)
            backbone = mirror(model, depth or 1, width, inner, heads)
        else:
            backbone, projection = ready(config.shadow_model, wide, init)
        if projection is None and width_of(backbone.config) != wide:
            projection = nn.Linear(width_of(backbone.config), wide, bias=False)
        if shares(config, backbone, model):
            backbone._modules.pop("embed_tokens", None)
        made = {BACKBONE: beside(model, backbone)}
        if projection is not None:
            made[PROJECTION] = beside(model, projection)
        if config.task_type == TaskType.SEQ_CLS and (name := head_name(model)):
            head = copying.deepcopy(bare(model.get_submodule(name)))
            made[HEAD] = head.requires_grad_(True)  # a frozen base has it frozen
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
        """The small decoder as a model of its own, with the head: it works without the base.

        It is of the base's class where the decoder is of its kind. It shares its tensors with the adapter, and its
        embeddings and head with the base, unless `copy`.
        """
        check_known([adapter_name or p.adapter], list(p.configs))
        p = replace(p, adapter=adapter_name or p.adapter)
        backbone, projection = p.network(BACKBONE), p.network(PROJECTION)
        assert backbone is not None
        head = None
        if (name := head_name(model)) is not None:
            head = p.network(HEAD) or model.get_submodule(name)
            head = head if projection is None else nn.Sequential(projection, head)
        made = standalone(model, backbone, head, shares(p.config, backbone, model))
        return copying.deepcopy(made) if copy else made
