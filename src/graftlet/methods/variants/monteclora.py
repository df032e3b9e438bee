# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError


@dataclass(kw_only=True)
class MontecloraConfig:
    """MonteCLoRA.

    Args:
        num_samples: how many noisy samples A is averaged over. use_entropy: reward even weights among them.
        dirichlet_prior: the concentration that the samples' weights start at. sample_scaler: how strong the noise is.
        kl_loss_weight: the weight of the divergence from the prior in the loss. buffer_size: how many draws of noise are
            made at a time.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"MontecloraConfig: {name}={getattr(self, name)}; a positive number is needed.")
