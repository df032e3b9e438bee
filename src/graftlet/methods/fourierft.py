# SPDX-License-Identifier: Apache-2.0
"""FourierFT: Fourier transform fine-tuning (arXiv 2405.03003).   dW = s Re ifft2(S),   S = n values at random places

The places, row by row in `[out, in]`, are drawn from a seed and not saved. An input goes through one transform of its
own length, to the columns of the places, and from their rows through another: dW x = s Re ifft(S ifft(x)).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..core.target import by_pattern
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.low_rank import shaped
from .parts.sparse import dense, few, scattered, seeded_places


@dataclass(kw_only=True)
class FourierFTConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """FourierFT.

    Args:
        n_frequency: how many places of the spectrum are trained. n_frequency_pattern: other numbers for layers whose path
            ends in a key (a regex).
        scaling: what the change is multiplied by. random_loc_seed: the seed of the places.
        init_weights: True (zeros: no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "fourierft_only" (of adapted layers).
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    bias: str = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    def check(self) -> None:
        for name, count in {"n_frequency": self.n_frequency, **(self.n_frequency_pattern or {})}.items():
            self.require(count > 0, f"number of places {name}={count}; a positive number is needed.")
        seeded = self.random_loc_seed is not None
        self.require(
            seeded, "random_loc_seed=None; a number is needed, since the places are drawn again at every load."
        )
        known = self.bias in ("none", "all", "fourier_only", "fourierft_only")
        self.require(known, f"bias={self.bias!r}; allowed: none, all, fourierft_only.")


@method("fourierft", FourierFTConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class FourierFT(Delta):
    exact_start = False

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, FourierFTConfig)
        count, entries = (
            by_pattern(config.n_frequency_pattern, key, config.n_frequency),
            site.columns * site.features_out,
        )
        config.require(count <= entries, f"n_frequency={count} exceeds the {entries} entries of the weight of {key!r}.")
        return {"count": count}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        places = Spec((p.count,), trainable=False, dtype=torch.int64, saved=False, persistent=False)
        return {"fourierft_spectrum": Spec((p.count,)), "fourierft_places": places}

    def derived(self, config: PeftConfig) -> bool:
        return True

    def init(self, p: View) -> None:
        entries = p.site.columns * p.site.features_out
        p.fourierft_places.copy_(seeded_places(p.count, entries, p.random_loc_seed, p.site.stack))
        if p.init_weights:
            p.fourierft_spectrum.zero_()
        else:
            p.fourierft_spectrum.normal_()

    def delta(self, p: View) -> Tensor:
        values = p.fourierft_spectrum.to(torch.promote_types(p.fourierft_spectrum.dtype, torch.float32))
        S = dense(values, p.fourierft_places, p.site).reshape(p.site.features_out, p.site.columns)
        return shaped(p.site, torch.fft.ifft2(S).real.to(p.fourierft_spectrum.dtype) * p.scaling)

    def whole(self, p: View, x: Tensor) -> bool:
        return not few(x, p.fourierft_spectrum, p.site)

    def update(self, p: View, x: Tensor) -> Tensor:
        if self.whole(p, x):
            return super().update(p, x)
        X = torch.fft.ifft(x.to(torch.promote_types(x.dtype, torch.float32)))
        rows, columns = p.fourierft_places // p.site.columns, p.fourierft_places % p.site.columns
        Y = scattered(X, p.fourierft_spectrum, rows, columns, p.site.features_out)
        return torch.fft.ifft(Y).real * p.scaling
