# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank adaptation (arXiv 2106.09685).   dW = s B A,   s = alpha / r  (rsLoRA, 2312.03732: alpha / sqrt r)

A `[r, in]` and B `[out, r]`. On a convolution A is a convolution to r channels and B mixes them; on an embedding A has
a column a token; on a stack of experts each has its own rows of A and columns of B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Method, Spec, View
from ..core.target import by_pattern
from ..errors import ConfigError, UnsupportedOptionError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .init.lora import initialiser
from .variants.dora import DoRA


@dataclass(kw_only=True)
class LoraRuntimeConfig:
    """Options that are never saved. ephemeral_gpu_offload: initialise on the GPU what stays on the CPU."""

    ephemeral_gpu_offload: bool = False


@dataclass(kw_only=True)
class LoraConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """LoRA.

    Args:
        r: the rank. lora_alpha: with r, the scaling. use_rslora: scale by alpha / sqrt(r).
        lora_dropout: dropout on the adapter's input.
        rank_pattern, alpha_pattern: other values for layers whose path ends in a key (a regex).
        bias: train the base's biases: "none", "all", or "lora_only" (of adapted layers). lora_bias: a bias on B.
        init_lora_weights: True (kaiming A, zero B), False (both random), "gaussian", "pissa", "pissa_niter_<k>".
        use_dora: train the weight's magnitude apart from its direction (arXiv 2402.09353).
        target_parameters: bare parameters to adapt, by path: matrices, or stacks of experts.
        trainable_token_indices: token rows to train in the input embedding, or by embedding name.
        layer_replication: rebuild the stack of blocks from ranges `[start, end)` of it, sharing the base's weights.
        ensure_weight_tying: adapt tied embedding and head alike.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | list[list[int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def check(self) -> None:
        ranks = {"r": self.r, **(self.rank_pattern or {})}
        for name, rank in ranks.items():
            self.require(rank > 0, f"rank {name}={rank!r}; a positive number is needed.")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout!r}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "lora_only"), f"bias={self.bias!r}; allowed: none, all, lora_only.")
        initialiser(self.init_lora_weights)
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise UnsupportedOptionError(
                    f"LoraConfig.{name} is part of the format but not available yet; leave it out."
                )
        if self.use_dora and self.lora_bias:
            raise ConfigError("LoraConfig: use_dora and lora_bias do not go together; choose one.")


UNSUPPORTED = (
    "megatron_config", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
)  # fmt: skip


@method("lora", LoraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class LoRA(Delta):
    def pick(self, site: Site, config: PeftConfig, key: str) -> Method:
        assert isinstance(config, LoraConfig)
        return DoRA(self) if config.use_dora else self

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, LoraConfig)
        r = by_pattern(config.rank_pattern, key, config.r)
        alpha = by_pattern(config.alpha_pattern, key, config.lora_alpha)
        _check(site, config, key, r)
        return {
            "r": r,
            "lora_alpha": alpha,
            "scaling": alpha / (math.sqrt(r) if config.use_rslora else r),
            "lora_bias": config.lora_bias,
            "lora_dropout": nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity(),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        if isinstance(site, Embedding):
            return {
                "lora_embedding_A": Spec((p.r, site.features_in)),
                "lora_embedding_B": Spec((site.features_out, p.r)),
            }
        ones = (1,) * len(site.kernel)
        specs = {
            "lora_A.weight": Spec((p.r, site.features_in, *site.kernel)),
            "lora_B.weight": Spec((site.features_out, p.r // site.groups, *ones)),
        }
        return {**specs, "lora_B.bias": Spec((site.features_out,))} if p.lora_bias else specs

    def init(self, p: View) -> Tensor | None:
        return initialiser(p.init_lora_weights)(p, *factors(p))

    def derived(self, config: PeftConfig) -> bool:
        assert isinstance(config, LoraConfig)
        return str(config.init_lora_weights).startswith("pissa")  # its base is not the one in the checkpoint

    def delta(self, p: View) -> Tensor:
        A, B = factors(p)
        return p.site.compose(B, A) * p.scaling

    def delta_bias(self, p: View) -> Tensor | None:
        return p.lora_B_bias * p.scaling if p.lora_bias else None

    def drop(self, p: View, x: Tensor) -> Tensor:
        idle = isinstance(p.lora_dropout, nn.Identity) or not x.is_floating_point()
        return x if idle else p.lora_dropout(x)

    def update(self, p: View, x: Tensor) -> Tensor:
        A, B = factors(p)
        y = p.site.mix(p.site.op(x, A), B)
        if p.lora_bias:
            y = p.site.on_channels(lambda h: h + p.lora_B_bias, y)
        return y * p.scaling

    def stacked(self, name: str, spec: Spec, experts: int) -> tuple[int, ...]:
        rank_first = name == "lora_A.weight"
        return (spec.shape[0] * experts, spec.shape[1]) if rank_first else (spec.shape[0], spec.shape[1] * experts)

    def unstacked(self, name: str, tensor: Tensor, experts: int) -> Tensor:
        if name == "lora_A":
            return tensor.reshape(experts, -1, tensor.shape[1])
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)


def factors(p: View) -> tuple[Tensor, Tensor]:
    """A and B, by whatever name they have on this site."""
    if isinstance(p.site, Embedding):
        return p.lora_embedding_A, p.lora_embedding_B
    return p.lora_A, p.lora_B


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
