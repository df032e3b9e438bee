# SPDX-License-Identifier: Apache-2.0
"""Lily: low-rank interconnected adaptation across layers (arXiv 2407.09946).   y += s (x A^T) (p1 B1 + ... + pE BE)

p is the mean, over all tokens of the batch, of softmax(router(x A^T)). Layers of the same name and shape share:
`stride_A` neighbours one A `[r, in]`, all of them the experts B `[E r, out]`. The router `[E, r]` is each layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Excludes, Layers, PeftConfig, Saves, Targets
from ..core.method import Holder, Routed, Spec, View
from ..core.tensors import share
from ..registry import method
from ..weights.site import Conv1D, Linear, Site


@dataclass(kw_only=True)
class LilyConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """Lily.

    Args:
        r: the rank. stride_A: how many neighbouring layers share an A. num_B: the number of experts, at least 2.
        scaling: what the update is multiplied by.
        init_weights: True (zero experts: no change at first) or False (random).
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.stride_A > 0, f"stride_A={self.stride_A}; at least 1 is needed.")
        self.require(self.num_B > 1, f"num_B={self.num_B}; at least 2 are needed, for a router to choose from.")


@method("lily", LilyConfig, sites=(Linear, Conv1D))
class Lily(Routed):
    unmixable = "its experts are weighed over all rows of a batch together"

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {
            "lily_A.weight": Spec((p.r, site.features_in)),
            "lily_B.weight": Spec((p.num_B * p.r, site.features_out)),
            "lily_router.weight": Spec((p.num_B, p.r)),
        }

    def init(self, p: View) -> None:
        for factor in (p.lily_A, p.lily_B, p.lily_router):
            torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if p.init_weights:
            p.lily_B.zero_()

    def link(self, layers: Mapping[str, Holder], adapter: str) -> None:
        alike: dict[tuple[str, torch.Size], list[Holder]] = {}
        for key, layer in layers.items():
            alike.setdefault((key.rpartition(".")[2], layer.view(adapter).site.shape), []).append(layer)
        for group in alike.values():
            stride = group[0].view(adapter).stride_A
            for i, layer in enumerate(group):
                share(group[i // stride * stride], layer, adapter, "lily_A.weight")
                share(group[0], layer, adapter, "lily_B.weight")

    def update(self, p: View, x: Tensor) -> Tensor:
        h = x @ p.lily_A.T
        odds = (h @ p.lily_router.T).softmax(-1).flatten(0, -2).mean(0)
        experts = p.lily_B.unflatten(0, (p.num_B, p.r))
        return h @ torch.einsum("e,ero->ro", odds, experts) * p.scaling
