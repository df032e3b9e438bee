# SPDX-License-Identifier: Apache-2.0
"""WaveFT: wavelet fine-tuning (arXiv 2505.12532).   dW = s IDWT2(S),   S = n values at random places

The places are drawn from a seed and not saved. The transform works on rows and columns each, dW = s G S H^T, so an input
goes through H^T, to the columns of the places, and from their rows through G.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..core.target import by_pattern
from ..errors import ConfigError, listing, nearest
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.low_rank import shaped
from .parts.sparse import few, scattered, seeded_places
from .parts.wavelet import FAMILIES, analysis, bands, places_in_bands, synthesis


@dataclass(kw_only=True)
class WaveFTConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """WaveFT.

    Args:
        n_frequency: how many coefficients of a layer are trained. n_frequency_pattern: other numbers for layers whose path
            ends in a key (a regex). proportional_parameters: n_frequency is the mean instead, and each layer gets a share
            by its size.
        scaling: what the change is multiplied by. random_loc_seed: the seed of the places.
        wavelet_family: db1 to db38, sym2 to sym20, coif1 to coif17. use_idwt: off, S itself is the change.
        init_weights: True (zeros: no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "waveft_only" (of adapted layers).
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    bias: str = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def check(self) -> None:
        for name, count in {"n_frequency": self.n_frequency, **(self.n_frequency_pattern or {})}.items():
            self.require(count > 0, f"number of places {name}={count}; a positive number is needed.")
        hint = nearest(self.wavelet_family, FAMILIES)
        known = self.wavelet_family in FAMILIES
        self.require(known, f"wavelet_family={self.wavelet_family!r}{hint} Allowed: {listing(FAMILIES, 80)}.")
        self.require(
            self.bias in ("none", "all", "waveft_only"), f"bias={self.bias!r}; allowed: none, all, waveft_only."
        )


@method("waveft", WaveFTConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class WaveFT(Delta):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, WaveFTConfig)
        if config.proportional_parameters:
            return {"count": 1}  # until `deal` has seen all layers
        return {"count": checked(by_pattern(config.n_frequency_pattern, key, config.n_frequency), site, key)}

    def deal(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
        assert isinstance(config, WaveFTConfig)
        if not config.proportional_parameters:
            return {}
        sizes = {key: site.features_out * site.columns for key, site in sites.items()}
        each = config.n_frequency * len(sites) / sum(sizes.values())
        return {key: {"count": checked(max(1, round(size * each)), sites[key], key)} for key, size in sizes.items()}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        places = Spec((2, p.count), trainable=False, dtype=torch.int64, saved=False, persistent=False)
        return {"waveft_spectrum": Spec((p.count,)), "waveft_places": places}

    def derived(self, config: PeftConfig) -> bool:
        return True

    def init(self, p: View) -> None:
        height, width = p.site.features_out, p.site.columns
        places = seeded_places(p.count, height * width, p.random_loc_seed, p.site.stack)
        if p.use_idwt:
            p.waveft_places.copy_(places_in_bands(places, height, width, p.wavelet_family))
        else:
            p.waveft_places.copy_(torch.stack([places // width, places % width], -2))
        if p.init_weights:
            p.waveft_spectrum.zero_()
        else:
            p.waveft_spectrum.normal_(std=0.01)

    def delta(self, p: View) -> Tensor:
        tall, wide = extent(p)
        rows, columns = p.waveft_places
        S = p.waveft_spectrum.new_zeros(tall * wide).index_add(0, rows * wide + columns, p.waveft_spectrum * p.scaling)
        if not p.use_idwt:
            return shaped(p.site, S)
        across = synthesis(S.reshape(tall, wide), p.wavelet_family, p.site.columns)
        return shaped(p.site, synthesis(across.T, p.wavelet_family, p.site.features_out).T)

    def whole(self, p: View, x: Tensor) -> bool:
        return not few(x, p.waveft_spectrum, p.site)

    def update(self, p: View, x: Tensor) -> Tensor:
        if self.whole(p, x):
            return super().update(p, x)
        h = analysis(x, p.wavelet_family) if p.use_idwt else x
        rows, columns = p.waveft_places
        y = scattered(h, p.waveft_spectrum * p.scaling, rows, columns, extent(p)[0])
        return synthesis(y, p.wavelet_family, p.site.features_out) if p.use_idwt else y


def extent(p: View) -> tuple[int, int]:
    """The height and width of S, with its bands."""
    height, width = p.site.features_out, p.site.columns
    return (
        (2 * bands(height, p.wavelet_family)[0], 2 * bands(width, p.wavelet_family)[0])
        if p.use_idwt
        else (height, width)
    )


def checked(count: int, site: Site, key: str) -> int:
    """A number of places that a layer has. Raises `ConfigError` for more."""
    entries = site.features_out * site.columns
    if count > entries:
        raise ConfigError(
            f"n_frequency={count} exceeds the {entries} entries of the weight of {key!r}; give it fewer in "
            "n_frequency_pattern."
        )
    return count
