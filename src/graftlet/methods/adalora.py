# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: adaptive budget of ranks (arXiv 2303.10512).   dW = s B diag(e) A,   s = alpha / r0

A `[r, in]`, B `[out, r]` and e, held as `lora_E` `[r, 1]`, are kept near a singular value decomposition by a penalty on
A and B. Training starts at r0 = `init_r` triplets a layer; an allocator zeroes the e of those that matter least, down
to a budget for all layers. Which are left stands in the config as `rank_pattern`, and only those go to the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.method import Allocator, Holder, Spec, View
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .allocation.ranks import RankAllocator
from .lora_config import LoraConfig
from .parts.dropout import check_dropout
from .parts.low_rank import LowRank


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA. Of LoRA's fields it uses lora_alpha, lora_dropout, bias, init_lora_weights (True or False) and targets.

    Args:
        target_r: the mean rank at the end. init_r: every layer's rank at the start.
        total_step: the steps of the whole training. tinit: steps before the budget shrinks. tfinal: steps at the end in
            which it stays. deltaT: steps between two cuts.
        beta1, beta2: how slowly the means of importance and of its uncertainty move.
        orth_reg_weight: the weight of the penalty for A and B that are not orthonormal.
        rank_pattern: which triplets are left, by layer; training fills it in.
    """

    reads_patterns: ClassVar[bool] = False
    needs_steps: ClassVar[str | None] = "total_step"

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None

    def check(self) -> None:
        for name in ("target_r", "init_r", "deltaT"):
            self.require(getattr(self, name) > 0, f"{name}={getattr(self, name)}; a positive number is needed.")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "lora_only"), f"bias={self.bias!r}; allowed: none, all, lora_only.")
        total = self.total_step or 0
        self.require(total > 0, f"total_step={self.total_step}; the number of training steps is needed, to plan cuts.")
        room = self.tinit < total - self.tfinal
        self.require(
            room, f"total_step={total} leaves no step for cuts between tinit={self.tinit} and tfinal={self.tfinal}."
        )
        used = next((name for name in OTHERS if getattr(self, name)), "")
        self.require(not used, f"{used} is an option of LoRA that AdaLoRA does not have; leave it out.")


OTHERS = (
    "use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "alora_invocation_tokens",
    "arrow_config", "lora_bias", "use_qalora", "megatron_config",
)  # fmt: skip


@method("adalora", AdaLoraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter), prefix="lora_")
class AdaLoRA(LowRank):
    dropout = "lora_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, AdaLoraConfig)
        check_dropout(site, key, "lora_dropout", config.lora_dropout)
        left = mask_of(config, key)
        return {
            "r": config.init_r if left is None else sum(left),
            "lora_dropout": nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity(),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {
            "lora_A": Spec((p.r, site.columns)),
            "lora_B": Spec((site.features_out, p.r)),
            "lora_E": Spec((p.r, 1)),
            "ranknum": Spec((1,), trainable=False, saved=False),
        }

    def derived(self, config: PeftConfig) -> bool:
        return True  # `ranknum` is not in the file

    def init(self, p: View) -> None:
        p.ranknum.fill_(p.init_r)  # also where fewer are left: the scaling stays
        std = 0.02 if p.init_lora_weights else 1.0
        for factor in (p.lora_A, p.lora_B, p.lora_E):
            factor.normal_(std=std)
        if p.init_lora_weights:
            p.lora_E.zero_()

    def pack(self, p: View, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The triplets that are left."""
        left = mask_of(p.config, p.key)
        if left is None or p.site.stack or len(left) != len(p.lora_E):
            return tensors
        index = torch.tensor(left, device=p.lora_E.device).nonzero()[:, 0]
        dims = {"lora_A": 0, "lora_B": 1, "lora_E": 0}
        return {key: tensor.index_select(dims[key], index) for key, tensor in tensors.items()}

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        return p.lora_A * p.lora_E, p.lora_B * (p.lora_alpha / (p.ranknum + 1e-5))

    def allocator(self, layers: Mapping[str, Holder], adapter: str) -> Allocator:
        return RankAllocator(layers, adapter, next(iter(layers.values())).view(adapter).config)

    def penalty(self, views: Sequence[View]) -> Tensor | None:
        """How far A and B are from orthonormal, in the mean over all."""
        weight = views[0].orth_reg_weight
        return torch.stack([far for p in views for far in (skewed(p.lora_A), skewed(p.lora_B.mT))]).mean() * weight


def mask_of(config: PeftConfig, key: str) -> list[bool] | None:
    """Which triplets of a layer are left, where that is known yet."""
    name = f"{key}.lora_E"
    patterns: dict[str, list[bool]] = getattr(config, "rank_pattern", None) or {}
    return next((mask for k, mask in patterns.items() if k == name or k.startswith(f"{name}.")), None)


def skewed(rows: Tensor) -> Tensor:
    """How far rows are from orthonormal: |A A^T - I|, in the mean over a stack."""
    one = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return torch.linalg.matrix_norm(rows @ rows.mT - one).mean()
