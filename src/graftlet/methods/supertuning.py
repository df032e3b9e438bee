# SPDX-License-Identifier: Apache-2.0
"""Super-Tuning: sparse deltas at a weight's largest entries (arXiv 2607.09287).   dW = values at top-n |W|  (+ s B A)

n is the share `1 - sparsity` of a weight's entries: those of the largest (or smallest) magnitude. Their places, row by
row, are saved, or found again in the base weight. With a rank r there is a low-rank part beside them ("Supra"): A
`[r, in]`, B `[out, r]`, s = alpha / r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..core.tensors import check_places
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import check_dropout
from .parts.low_rank import through
from .parts.sparse import applied, dense, few, onto


@dataclass(kw_only=True)
class SupertuningConfig(Targets, Saves, PeftConfig):
    """Super-Tuning.

    Args:
        sparsity: the share of a weight's entries that stay as they are. select_top: train the largest, or the smallest.
        r: the rank of a low-rank part; None for none. lora_alpha: with r, its scaling; None is 2 r.
        lora_dropout: dropout on the low-rank part's input.
        save_precomputed_indices: save the places; otherwise a load finds them in the base weight, which must be the same.
        init_weights: True (no change at first) or False (random).
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def check(self) -> None:
        self.require(0 <= self.sparsity < 1, f"sparsity={self.sparsity}; allowed: 0 up to, not with, 1.")
        self.require(self.r is None or self.r > 0, f"r={self.r}; a positive number or None is needed.")
        alone = self.lora_alpha is not None and self.r is None
        self.require(not alone, f"lora_alpha={self.lora_alpha} scales a low-rank part; give its rank r too.")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout}; allowed: 0 up to, not with, 1.")


@method("supertuning", SupertuningConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class SuperTuning(Delta):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, SupertuningConfig)
        check_dropout(site, key, "lora_dropout", config.lora_dropout)
        entries = site.columns * site.features_out
        count = int(entries * (1 - config.sparsity))
        config.require(
            count > 0, f"sparsity={config.sparsity} leaves nothing to train of the {entries} weights of {key!r}."
        )
        alpha = 2 * (config.r or 0) if config.lora_alpha is None else config.lora_alpha
        return {
            "places": count,
            "supertuning_scaling": alpha / (config.r or 1),
            "supertuning_lora_dropout": nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity(),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        places = Spec.frozen((p.places,), torch.int32, p.save_precomputed_indices)
        sparse = {"supertuning_values": Spec((p.places,)), "supertuning_indices": places}
        if p.r is None:
            return sparse
        A, B = Spec((p.r, site.columns)), Spec((site.features_out, p.r))
        return {**sparse, "supertuning_lora_A.weight": A, "supertuning_lora_B.weight": B}

    def derived(self, config: PeftConfig) -> bool:
        assert isinstance(config, SupertuningConfig)
        return not config.save_precomputed_indices

    def init(self, p: View) -> None:
        size = p.site.read()[0].abs().flatten(1 if p.site.stack else 0)
        p.supertuning_indices.copy_(size.topk(p.places, largest=p.select_top).indices)
        p.supertuning_values.normal_()
        if p.r is not None:
            p.supertuning_lora_A.uniform_(-1, 1).div_(math.sqrt(p.site.columns))
            p.supertuning_lora_B.uniform_(-1, 1).div_(math.sqrt(p.r))
        if p.init_weights:
            p.supertuning_values.zero_()
            if p.r is not None:
                p.supertuning_lora_B.zero_()

    def check_loaded(self, p: View) -> None:
        check_places(p.supertuning_indices, p.site.features_out * p.site.columns, "supertuning_indices")

    def delta(self, p: View) -> Tensor:
        dW = self._sparse(p, p.supertuning_values.dtype)
        if p.r is None:
            return dW
        return dW + p.supertuning_scaling * (p.supertuning_lora_B @ p.supertuning_lora_A).reshape(dW.shape)

    def _sparse(self, p: View, dtype: torch.dtype) -> Tensor:
        return dense(p.supertuning_values.to(dtype), p.supertuning_indices.long(), p.site)

    def rounded(self, p: View, dtype: torch.dtype) -> Tensor:
        return self._sparse(p, dtype) if p.r is None else super().rounded(p, dtype)

    def onto(self, p: View, W: Tensor) -> Tensor:
        return onto(W, p.supertuning_values, p.supertuning_indices.long()) if p.r is None else super().onto(p, W)

    def whole(self, p: View, x: Tensor) -> bool:
        return p.r is None and not few(x, p.supertuning_values, p.site)

    def update(self, p: View, x: Tensor) -> Tensor:
        y = applied(x, p.supertuning_values, p.supertuning_indices.long(), p.site)
        if p.r is None:
            return y
        dropped = p.supertuning_lora_dropout(x) if x.is_floating_point() else x
        return y + p.supertuning_scaling * through(p.site, dropped, p.supertuning_lora_A, p.supertuning_lora_B)
