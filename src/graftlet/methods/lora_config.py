# SPDX-License-Identifier: Apache-2.0
"""The options of LoRA, and which of them go together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.target import by_pattern
from ..errors import PatternOrderWarning, UnsupportedOptionError, warn
from . import variants
from .init import initialiser
from .init.corda import CordaConfig
from .init.eva import EvaConfig
from .init.loftq import LoftQConfig
from .init.lora_ga import LoraGAConfig
from .variants.arrow import ArrowConfig
from .variants.bdlora import BdLoraConfig
from .variants.kasa import KasaConfig
from .variants.monteclora import MontecloraConfig
from .variants.velora import VeloraConfig


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
        init_lora_weights: True (kaiming A, zero B), False (both random), "gaussian", "orthogonal"; from the weight: "pissa",
            "pissa_niter_<k>", "olora", "mica", "loftq" (`loftq_config`); from data: "eva" (`eva_config`), "corda"
            (`corda_config`), "lora_ga" (`lora_ga_config`). Layers on which one means nothing start in the ordinary way if
            they are embeddings, and are refused otherwise.
        use_dora, use_bdlora, kasa_config, velora_config, monteclora_config, alora_invocation_tokens, arrow_config: the
            variants, one at a time.
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
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | list[list[int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False

    @property
    def picky(self) -> bool:
        return self.kasa_config is not None

    def check(self) -> None:
        ranks = {"r": self.r, **(self.rank_pattern or {})}
        for name, rank in ranks.items():
            self.require(rank > 0, f"rank {name}={rank!r}; a positive number is needed.")
        self.require(abs(self.lora_alpha) < 1e30, f"lora_alpha={self.lora_alpha!r} overflows single precision.")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout!r}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "lora_only"), f"bias={self.bias!r}; allowed: none, all, lora_only.")
        for name in ("rank_pattern", "alpha_pattern"):
            _tell_idle(name, getattr(self, name) or {})
        start = initialiser(self.init_lora_weights)
        if start.checks is not None:
            start.checks(self, ranks)
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise UnsupportedOptionError(
                    f"LoraConfig.{name} is part of the format but not available yet; leave it out."
                )
        variants.check(self, start.name)


LOOKED_AT = 500
"""How many keys of a pattern are compared with each other."""


def _tell_idle(name: str, patterns: dict[str, Any]) -> None:
    """Name a key that an earlier one leaves nothing: the first that matches a layer counts."""
    names = [key for key in patterns if re.fullmatch(r"[\w.-]+", key)][:LOOKED_AT]
    for i, key in enumerate(names):
        for earlier in names[:i]:
            if patterns[earlier] != patterns[key] and by_pattern({earlier: True}, key, False):
                warn(
                    PatternOrderWarning,
                    f"{name} has {key!r} after {earlier!r}, which matches all that it does and comes first; put the "
                    "longer one before it.",
                    stacklevel=6,
                )


UNSUPPORTED = ("megatron_config",)


def plain(like: PeftConfig, ranks: Mapping[str, int], bias: bool) -> LoraConfig:
    """A config without variants whose factors have these ranks, by layer, and a scaling of 1; else as `like` has it."""
    r = max(ranks.values(), default=1)
    other = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    kept = {name: getattr(like, name) for name in PLACES}
    return LoraConfig(r=r, lora_alpha=r, rank_pattern=other, alpha_pattern=dict(other), lora_bias=bias, **kept)


def described(config: PeftConfig, layers: Mapping[str, tuple[int, float]]) -> None:
    """Let a config mean these ranks and scalings, by layer."""
    ranks = {path: r for path, (r, _) in layers.items()}
    alphas = {path: round(r * scaling, 6) for path, (r, scaling) in layers.items()}
    r, alpha = max(ranks.values()), Counter(alphas.values()).most_common(1)[0][0]
    config.__dict__.update(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        use_rslora=False,
        rank_pattern={f"^{re.escape(p)}": rank for p, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
    )


PLACES = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters",
    "layer_replication", "ensure_weight_tying",
)  # fmt: skip
"""What a config says of the model, and of where in it an adapter stands."""
