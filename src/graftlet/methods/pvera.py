# SPDX-License-Identifier: Apache-2.0
"""PVeRA: probabilistic VeRA (arXiv 2512.07703).   y += b * B z,   z ~ N(mu, diag(e^v)),   (mu, v) = d * A x

The shared frozen pair is A `[2 r, in]`, whose halves give the mean and the logarithm of the variance, and B `[out, r]`. A
layer's own are d `[2 r]` and b `[out]`. The merged weight is the mean's; so is what inference gives, unless asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.method import View
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Conv, Conv1D, Embedding, Linear, Site
from .parts.shared_pair import SharedPair, SharedPairConfig


@dataclass(kw_only=True)
class PveraConfig(SharedPairConfig):
    """PVeRA.

    Args:
        r: the rank of the shared pair. d_initial: what d starts at.
        projection_prng_key: the seed of the shared pair. save_projection: write the pair into the file too, so that it
            does not depend on the random generator that reads it.
        sample_at_inference: draw in evaluation mode too, and not only in training. generator_seed: draw from a generator
            of a layer's own, started from this.
        pvera_dropout: dropout on the adapter's input.
        init_weights: True (zero b: no change at first) or False (random). bias: "none", "all", or "pvera_only".
    """

    pvera_dropout: float = 0.0
    sample_at_inference: bool = False
    generator_seed: int | None = None


@method("pvera", PveraConfig, sites=(Linear, Conv1D, Conv, Embedding), prefix="pvera_lambda_")
class PVeRA(SharedPair):
    name, dropout = "pvera", "pvera_dropout"
    heads = 2

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, PveraConfig)
        if site.groups > 1:
            raise ConfigError(f"PVeRA draws between A and B, which the groups of {key!r} cannot share; exclude it.")
        return {**super().settings(site, config, key), "noise": Noise(config.generator_seed)}

    def update(self, p: View, x: Tensor) -> Tensor:
        if not (p.training or p.sample_at_inference):
            return super().update(p, x)
        (b, d), (A, B) = self.own(p), self.pair(p)
        h = p.site.op(x, A.unflatten(1, (-1, *p.site.kernel)))
        return p.site.on_channels(lambda h: p.noise(h * d) @ B.T * b, h)


class Noise(nn.Module):
    """Numbers drawn around means with log-variances, `[..., 2 r]` to `[..., r]`; from a generator where there is a seed."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def forward(self, h: Tensor) -> Tensor:
        mean, log_variance = h.chunk(2, -1)
        return (
            mean
            + torch.randn(mean.shape, dtype=h.dtype, device=h.device, generator=self._generator(h))
            * (log_variance / 2).exp()
        )

    def _generator(self, h: Tensor) -> torch.Generator | None:
        if self.seed is None:
            return None
        if h.device not in self.generators:
            self.generators[h.device] = torch.Generator(h.device).manual_seed(self.seed)
        return self.generators[h.device]
