# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: saved LoRA experts mixed by a classifier (arXiv 2402.07148).   y_t += w sum_a c_a(t) s_a B_a A_a x_t

A call is run twice: the base alone gives the last hidden state, from which the classifier makes the shares c of each
token, layer by layer or for all layers alike; then the experts act with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.context import current
from ..core.layer import AdaptedLayer
from ..core.method import Delta, Routed, Spec, View
from ..core.target import walk
from ..errors import CallError, ConfigError
from ..registry import method
from ..weights.site import Conv1D, Embedding, Linear, Site
from .parts.classifier import CLASSIFIER, Classified
from .parts.share_log import LOG, Journal, Logged


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """X-LoRA.

    Args:
        hidden_size: of the base's hidden states; read off its config unless given. adapters: the LoRA experts, by name:
            directories or repositories. They are loaded, and stay frozen unless use_trainable_adapters.
        xlora_depth, xlora_size, xlora_dropout_p: the classifier's linear layers, their width, the dropout between them.
        layerwise_scalings: shares of its own for each layer.
        enable_softmax, softmax_temperature: shares add up to one. top_k_lora: the largest shares only.
        enable_softmax_topk: make those add up to one again, instead of enable_softmax.
        scaling_pass_value: the experts' share in the first run. global_scaling_weight: w.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    @property
    def brings(self) -> dict[str, str]:
        return self.adapters or {}

    @property
    def teaches(self) -> bool:
        return self.use_trainable_adapters

    def check(self) -> None:
        for name in ("xlora_depth", "xlora_size", "softmax_temperature", "top_k_lora", "hidden_size"):
            value = getattr(self, name)
            self.require(value is None or value > 0, f"{name}={value}; a positive number is needed.")
        self.require(
            0 <= self.xlora_dropout_p < 1, f"xlora_dropout_p={self.xlora_dropout_p}; allowed: 0 up to, not with, 1."
        )
        alone = self.enable_softmax_topk and self.top_k_lora is None
        self.require(not alone, "enable_softmax_topk=True means the experts that top_k_lora leaves; give it too.")


@method("xlora", XLoraConfig, sites=(Linear, Conv1D, Embedding), prefix=CLASSIFIER)
class XLoRA(Classified, Logged, Routed):
    law = "one"
    unmergeable = "each token mixes the experts in its own way"
    unmixable = "the experts' shares come from a run of the whole batch"
    exact_start = False
    saves_embedding = False
    controls = (
        *LOG, "set_topk_lora", "set_global_scaling_weight", "get_global_scaling_weight", "set_scaling_pass_value",
    )  # fmt: skip

    # where it is

    def complete(self, config: PeftConfig, model: nn.Module) -> None:
        """Take the layers that its experts are on, and the base's hidden size."""
        assert isinstance(config, XLoraConfig)
        names = set(config.brings)
        layers = {p.path: p.module for p in walk(model) if isinstance(p.module, AdaptedLayer)}
        held = {path: names & set(layer.methods) for path, layer in layers.items()}
        config.require(
            bool(names) and names == set().union(*held.values()), f"adapters={sorted(names)} are not all there."
        )
        for path, experts in held.items():
            plain = all(isinstance(layers[path].methods[n], Delta) for n in experts)
            config.require(
                plain, f"the experts on {path!r} must add to what the layer gives, as LoRA does; DoRA does not."
            )
        config.target_modules = {path for path, experts in held.items() if experts}
        config.hidden_size = config.hidden_size or hidden_size(model)

    def deal(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
        journal = Journal()
        return {key: {"number": i, "layers": len(sites), "journal": journal} for i, key in enumerate(sites)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {}

    def init(self, p: View) -> None:
        """No layer has tensors of its own."""

    # a call

    def rehearse(
        self, p: View, run: Callable[[Mapping[str, Tensor] | None], Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        name, dummy = carried(p), None
        if p.scaling_pass_value:
            value = torch.full((*size, p.layers, len(p.config.brings)), p.scaling_pass_value)
            dummy = {name: value.to(p.site.device)}
        shares = self.classify(p, run(dummy))
        p.journal.latest = shares
        if p.journal.on:
            p.journal.kept.append(shares)
        return {name: shares}

    def update(self, p: View, x: Tensor) -> Tensor:
        call, looked_up = current(), isinstance(p.site, Embedding)
        shares = None if call is None else call.tokens(carried(p), x.shape if looked_up else x.shape[:-1])
        if shares is None:
            raise CallError("X-LoRA needs a call of the whole PeftModel, from which the experts' shares come.")
        shares = chosen(p, shares[..., p.number, :].to(x.device))
        parts = []
        for i, name in enumerate(p.config.brings):
            if name in p.peers:
                expert, view = p.peers[name]
                assert isinstance(expert, Delta)
                parts.append(expert.update(view, expert.drop(view, view.cast(x))) * shares[..., i, None])
        return torch.stack(parts).sum(0) * p.global_scaling_weight

    # what can be set and looked at on the model

    def set_topk_lora(self, p: View, value: int | None) -> None:
        """Let the `value` experts with the largest shares act; all of them for None."""
        config: Any = p.config
        config.require(value is None or value > 0, f"top_k_lora={value}; a positive number, or None, is needed.")
        config.top_k_lora = value

    def set_global_scaling_weight(self, p: View, weight: float) -> None:
        """What all experts' updates are multiplied by."""
        config: Any = p.config
        config.global_scaling_weight = weight

    def get_global_scaling_weight(self, p: View) -> float:
        """What all experts' updates are multiplied by."""
        return p.global_scaling_weight

    def set_scaling_pass_value(self, p: View, value: float | None) -> None:
        """The experts' share in the first run; one in their number for None."""
        config: Any = p.config
        config.scaling_pass_value = 1 / len(p.config.brings) if value is None else value


def carried(p: View) -> str:
    """The name under which a call carries the shares."""
    return f"shares of {p.adapter}"


def chosen(p: View, shares: Tensor) -> Tensor:
    """The shares of the `top_k_lora` experts, made to add up to one where that is asked for."""
    if p.top_k_lora is None:
        return shares
    best = shares.topk(min(p.top_k_lora, shares.shape[-1]), dim=-1)
    kept = best.values.softmax(-1) if p.enable_softmax_topk else best.values
    return torch.zeros_like(shares).scatter(-1, best.indices, kept)


def hidden_size(model: nn.Module) -> int:
    """The size of a model's hidden states, by its config."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(size, int):
        raise ConfigError("XLoraConfig: the model's config has no hidden_size; give it.")
    return size
