# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank adaptation (arXiv 2106.09685).   dW = s B A,   s = alpha / r  (rsLoRA, 2312.03732: alpha / sqrt r)

A `[r, in]` and B `[out, r]`. On a convolution A is a convolution to r channels and B mixes them; on an embedding A has
a column a token; on a stack of experts each has its own rows of A and columns of B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from ..core.algebra import Factors, Thin
from ..core.method import Delta, Holder, Method, Spec, View
from ..core.target import by_pattern
from ..core.tensors import share
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .init import Start, initialiser
from .lora_config import LoraConfig as LoraConfig
from .lora_config import LoraRuntimeConfig as LoraRuntimeConfig
from .lora_config import described, plain
from .variants import wrapped


@method("lora", LoraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class LoRA(Delta):
    universal = True
    dropout = "lora_dropout"
    scales = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

    def pick(self, site: Site, config: PeftConfig, key: str) -> Method:
        return wrapped(self, config)

    def meet(self, config: PeftConfig, other: PeftConfig) -> None:
        variant = wrapped(self, config)
        if variant is not self:
            variant.meet(config, other)

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, LoraConfig)
        r = by_pattern(config.rank_pattern, key, config.r)
        alpha = by_pattern(config.alpha_pattern, key, config.lora_alpha)
        _check(site, config, key, r)
        initialiser(config.init_lora_weights).on(site, key, r)
        return {
            "r": r,
            "lora_alpha": alpha,
            "scaling": alpha / (math.sqrt(r) if config.use_rslora else r),
            "lora_bias": config.lora_bias,
            "lora_dropout": nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity(),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        if isinstance(site, Embedding):
            names = "lora_embedding_A", "lora_embedding_B"
            shapes = (p.r, site.features_in), (site.features_out, p.r)
        else:
            names = "lora_A.weight", "lora_B.weight"
            ones = (1,) * len(site.kernel)
            shapes = (p.r, site.features_in, *site.kernel), (site.features_out, p.r // site.groups, *ones)
        frozen = _start(p).frozen
        specs = {n: Spec(s, trainable=f not in frozen) for n, s, f in zip(names, shapes, "AB", strict=True)}
        return {**specs, "lora_B.bias": Spec((site.features_out,))} if p.lora_bias else specs

    def init(self, p: View) -> Tensor | None:
        if p.lora_bias:
            p.lora_B_bias.zero_()
        return _start(p).fill(p, *factors(p))

    def derived(self, config: PeftConfig) -> bool:
        assert isinstance(config, LoraConfig)
        return initialiser(config.init_lora_weights).rebases  # its base is not the one in the checkpoint

    def link(self, layers: Mapping[str, Holder], adapter: str) -> None:
        """Tied layers that are to stay alike: each uses the embedding's factors."""
        if not next(iter(layers.values())).view(adapter).ensure_weight_tying:
            return
        views = {key: layer.view(adapter) for key, layer in layers.items()}
        leaders = {id(p.site.weight): k for k, p in reversed(views.items()) if isinstance(p.site, Embedding)}
        for key in views:
            leader = leaders.get(id(views[key].site.weight), key)
            if leader == key:
                continue
            if isinstance(views[key].site, Embedding):
                for name in ("lora_embedding_A", "lora_embedding_B"):
                    share(layers[leader], layers[key], adapter, name)
            else:
                layers[key].mirror(adapter, "lora_A.weight", layers[leader], "lora_embedding_B")
                layers[key].mirror(adapter, "lora_B.weight", layers[leader], "lora_embedding_A")

    def delta(self, p: View) -> Tensor:
        A, B = factors(p)
        return p.site.compose(B, A).mul_(p.scaling)

    def delta_bias(self, p: View) -> Tensor | None:
        return p.lora_B_bias * p.scaling if p.lora_bias else None

    def update(self, p: View, x: Tensor) -> Tensor:
        A, B = factors(p)
        y = p.site.mix(p.site.op(x, A), B)
        if p.lora_bias:
            y = p.site.on_channels(lambda h: h + p.lora_B_bias, y)
        return y * p.scaling

    def thin(self, p: View) -> Thin | None:
        rate = self.rate(p)
        if not p.site.linear or rate is None or p.lora_bias or isinstance(p.scaling, Tensor):
            return None
        return Thin(p.lora_A, p.lora_B, p.scaling, rate)

    def factored(self, p: View) -> Factors:
        A, B = factors(p)
        if p.site.stack:
            return Factors(
                self.unstacked("lora_A", A, p.site.stack), self.unstacked("lora_B", B, p.site.stack), p.scaling
            )
        cells = p.site.groups
        return Factors(A.flatten(1).unflatten(0, (cells, -1)), B.flatten(1).unflatten(0, (cells, -1)), p.scaling)

    def holding(self, like: PeftConfig, ranks: Mapping[str, tuple[int, Site]], bias: bool) -> PeftConfig:
        return plain(like, {path: r * site.groups for path, (r, site) in ranks.items()}, bias)

    def recorded(self, config: PeftConfig, held: Sequence[View]) -> None:
        described(config, {p.key: (p.r, float(p.scaling)) for p in held})

    def hold(self, p: View, factors: Factors, bias: Tensor | None) -> None:
        own = self.factored(p)  # views of the tensors themselves
        r = factors.A.shape[1]
        own.A.zero_()[:, :r] = factors.A * (factors.scale / own.scale)
        own.B.zero_()[:, :, :r] = factors.B
        if p.lora_bias:
            p.lora_B_bias.copy_(p.lora_B_bias.new_zeros(()) if bias is None else bias / own.scale)

    def stacked(self, name: str, spec: Spec, experts: int) -> tuple[int, ...]:
        rank_first = name == "lora_A.weight"
        return (spec.shape[0] * experts, spec.shape[1]) if rank_first else (spec.shape[0], spec.shape[1] * experts)

    def unstacked(self, name: str, tensor: Tensor, experts: int) -> Tensor:
        if name == "lora_A":
            return tensor.reshape(experts, -1, tensor.shape[1])
        if name != "lora_B":
            return tensor
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)


def factors(p: View) -> tuple[Tensor, Tensor]:
    """A and B, by whatever name they have on this site."""
    if isinstance(p.site, Embedding):
        return p.lora_embedding_A, p.lora_embedding_B
    return p.lora_A, p.lora_B


def _start(p: View) -> Start:
    return initialiser(p.init_lora_weights).on(p.site, p.key, p.r)


def _check(site: Site, config: LoraConfig, key: str, r: int) -> None:
    if site.opaque and config.lora_dropout:
        raise ConfigError(
            f"lora_dropout={config.lora_dropout} cannot work on {key!r}, which is adapted through its weight; use 0."
        )
    if r % site.groups:
        raise ConfigError(f"r={r} on {key!r} must be a multiple of the convolution's {site.groups} groups.")
    if config.lora_bias and not site.has_bias:
        raise ConfigError(f"lora_bias=True, but {key!r} has no bias that it could be merged into; leave it out.")
    if config.lora_bias and isinstance(site, (Embedding, Parameter, Attention)):
        raise ConfigError(f"lora_bias=True cannot work on {key!r}, a {type(site).__name__}.")
