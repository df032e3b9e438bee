# SPDX-License-Identifier: Apache-2.0
"""KaSA: knowledge-aware singular values (arXiv 2412.06071).   dW = s B diag(d) A  on W without its r smallest singular parts

To keep it near a singular value decomposition, training adds `beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|)` to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import PeftConfig
from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from ..init.spectral import readable
from . import DeltaWrapper, variant


@dataclass(kw_only=True)
class KasaConfig:
    """KaSA. beta: the weight of |d|^2 in the loss. gamma: that of the factors' distance from orthogonality."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"KasaConfig: {name}={getattr(self, name)}; 0 or more is needed.")


@variant("kasa_config")
class KaSA(DeltaWrapper):
    sites = (Linear,)
    starts = ("True", "False", "gaussian", "orthogonal", "eva")  # the others need the weight for themselves

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        settings = super().settings(site, config, key)
        if settings["r"] >= min(site.shape):
            raise ConfigError(
                f"kasa_config needs r < {min(site.shape)} on {key!r}, so that something is left of the weight; "
                f"r={settings['r']} was given. Lower it there by rank_pattern."
            )
        return settings

    def meet(self, config: PeftConfig, other: PeftConfig) -> None:
        if getattr(other, "kasa_config", None) is None:
            raise ConfigError(
                f"an adapter with kasa_config trains on a part of the base's weights, one of {other.peft_type} without it "
                "on the whole; they cannot stand on one model."
            )

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {**self.inner.params(site, p), "lora_diag": Spec((p.r,))}

    def init(self, p: View) -> Tensor:
        self.inner.init(p)
        p.lora_diag.normal_()
        U, S, Vh = torch.linalg.svd(readable(p, "True"), full_matrices=False)
        kept = len(S) - p.r
        return (U[:, :kept] * S[:kept]) @ Vh[:kept]

    def derived(self, config: PeftConfig) -> bool:
        return True  # the truncated base is not in the file

    def seen(self, p: View) -> View:
        return p.over({"lora_B": p.lora_B * p.lora_diag})

    def penalty(self, views: Sequence[View]) -> Tensor:
        return torch.stack([self.loss(p) for p in views]).sum()

    def loss(self, p: View) -> Tensor:
        """What this layer adds to the loss."""
        A, B, d = p.lora_A, p.lora_B, p.lora_diag
        one = torch.eye(len(d), dtype=d.dtype, device=d.device)
        skew = torch.linalg.matrix_norm(B.T @ B - one) + torch.linalg.matrix_norm(A @ A.T - one)
        options = p.kasa_config
        return options.beta * d.square().sum() + options.gamma * skew
