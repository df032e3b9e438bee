# SPDX-License-Identifier: Apache-2.0
"""SHiRA: sparse high-rank adaptation (arXiv 2406.13175).   dW = values at r (in + out) fixed places, 0 elsewhere

The places are drawn once, by seed or by a function of the user's, and saved as `shira_indices` `[2, n]`: rows and
columns of W as a matrix `[out, in * kernel]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..config import FanInFanOut, PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..core.tensors import check_places
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.sparse import applied, dense, few, onto

MaskFunction = Callable[..., Tensor]


@dataclass(kw_only=True)
class ShiraConfig(Targets, Saves, FanInFanOut, PeftConfig):
    """SHiRA.

    `config.mask_fn` may be set to a function `(base_layer, r, **kwargs) -> mask`: zeros, with ones at the r (in + out)
    places to train, of the layer's weight's shape. It is not saved; the places are.

    Args:
        r: a layer gets as many places as a LoRA of this rank has parameters.
        mask_type: "random". random_seed: for the same places every time.
        init_weights: True (zeros: no change at first) or False (random).
    """

    mask_fn: ClassVar[MaskFunction | None] = None

    r: int = 32
    mask_type: Literal["random"] = "random"
    random_seed: int | None = None
    init_weights: bool = True

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")


@method("shira", ShiraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class SHiRA(Delta):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, ShiraConfig)
        rows, columns = matrix(site)
        count = config.r * (rows + columns)
        if count > rows * columns:
            fits = rows * columns // (rows + columns)
            raise ConfigError(
                f"ShiraConfig.r={config.r} asks for {count} places in {key!r}, whose weight has {rows * columns}; "
                f"the largest r there is {fits}."
            )
        return {"r": config.r, "places": count}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {
            "shira_weight": Spec((p.places,)),
            "shira_indices": Spec((2, p.places), trainable=False, dtype=torch.int32, persistent=False),
        }

    def init(self, p: View) -> None:
        if p.init_weights:
            p.shira_weight.zero_()
        else:
            p.shira_weight.normal_()
        masks = [self._mask(p) for _ in range(max(1, p.site.stack))]
        places = torch.stack([mask.flatten(1).nonzero().T for mask in masks])
        p.shira_indices.copy_(places.reshape(p.shira_indices.shape))

    def check_loaded(self, p: View) -> None:
        for places, below in zip(p.shira_indices.unbind(-2), matrix(p.site), strict=True):
            check_places(places, below, "shira_indices")

    def _mask(self, p: View) -> Tensor:
        chosen = p.mask_fn
        if chosen is None:
            return random_mask(matrix(p.site), p.places, p.random_seed)
        mask = p.site.canonical(chosen(p.site.module, p.r, random_seed=p.random_seed))
        given = int(mask.count_nonzero())
        if mask.flatten(1).shape != matrix(p.site) or given != p.places:
            raise ConfigError(
                f"ShiraConfig.mask_fn gave a mask of shape {tuple(mask.shape)} with {given} places for {p.key!r}; "
                f"the weight's shape with {p.places} places is needed."
            )
        return mask

    def delta(self, p: View) -> Tensor:
        return dense(p.shira_weight, places(p), p.site)

    def rounded(self, p: View, dtype: torch.dtype) -> Tensor:
        return dense(p.shira_weight.to(dtype), places(p), p.site)

    def onto(self, p: View, W: Tensor) -> Tensor:
        return onto(W, p.shira_weight, places(p))

    def whole(self, p: View, x: Tensor) -> bool:
        return not few(x, p.shira_weight, p.site)

    def update(self, p: View, x: Tensor) -> Tensor:
        return applied(x, p.shira_weight, places(p), p.site)


def places(p: View) -> Tensor:
    """The places as indices into the matrix, row by row."""
    rows, columns = p.shira_indices.long()
    return rows * p.site.columns + columns


def matrix(site: Site) -> tuple[int, int]:
    """The rows and columns of a site's weight as one matrix."""
    shape = site.shape[1:] if site.stack else site.shape
    return shape[0], shape[1:].numel()


def random_mask(shape: tuple[int, int], places: int, seed: int | None) -> Tensor:
    """A matrix of zeros with ones at random places: the same for the same seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape)
    mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:places]] = 1
    return mask
