# SPDX-License-Identifier: Apache-2.0
"""AdaMSS: adaptive multi-subspace adaptation (openreview 8ZdWmpYxT0).   d[W | b] at rows c_i = B_i A_i V^T

V^T `[r, in + 1]` holds the first right singular vectors of [W | b] (of W, without a bias) and is frozen. The rows are
grouped by k-means on the left ones U; each group i has an A_i `[k, r]` and a B_i `[rows, k]`. The groups are not saved:
a load finds them again, by the same seeds, so it needs the same base weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Layers, PeftConfig, Saves, Targets
from ..core.method import Allocator, Holder, Spec, View
from ..errors import DependencyError, UnsupportedLayerError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .allocation.subspaces import SubspaceAllocator
from .parts.low_rank import LowRank, kaiming, through

KMEANS = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
"""Part of the format: other settings would find other groups."""


@dataclass(kw_only=True)
class AdamssConfig(Targets, Layers, Saves, PeftConfig):
    """AdaMSS.

    Args:
        r: the number of right singular vectors. num_subspaces: the number of groups. subspace_rank: a group's largest k.
        use_dynamic_rank: k is the number of a group's directions whose energy is above svd_threshold of the largest's.
        random_seed: of the decomposition.
        use_asa, asa_target_subspaces, init_warmup, final_warmup, mask_interval, asa_importance_beta,
            asa_uncertainty_beta, asa_schedule_exponent: a plan by which training freezes the groups that matter least.
        init_weights: "orthogonal" (a group's main directions, zero B: no change at first) or None (random).
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Literal["orthogonal"] | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def check(self) -> None:
        for name in ("r", "num_subspaces", "subspace_rank", "mask_interval"):
            self.require(getattr(self, name) > 0, f"{name}={getattr(self, name)}; a positive number is needed.")
        warm = f"init_warmup={self.init_warmup}, final_warmup={self.final_warmup}; the first must be the smaller."
        self.require(self.init_warmup < self.final_warmup, warm)


@method("adamss", AdamssConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class AdaMSS(LowRank):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        """The groups decide the tensors' shapes, so W is decomposed here; `init` uses what was found, and forgets it:
        once more, it finds it again."""
        assert isinstance(config, AdamssConfig)
        if site.stack:
            raise UnsupportedLayerError(f"AdaMSS cannot adapt {key!r}: experts would have groups of different sizes.")
        U, VT, groups = decomposed(site, config)
        ranks = [rank_of(U[group], config) for group in groups]
        return {"groups": [len(group) for group in groups], "ranks": ranks, "found": [U, VT, groups]}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        r = min(p.r, site.features_out, site.columns + site.has_bias)
        specs = {
            "adamss_newB": Spec.frozen((r, site.columns + site.has_bias), saved=True),
            "place": Spec.frozen((site.features_out,), torch.int64),
        }
        for i, (rows, k) in enumerate(zip(p.groups, p.ranks, strict=True)):
            specs.update({f"adamss_A.{i}": Spec((k, r)), f"adamss_B.{i}": Spec((rows, k))})
        return specs

    def derived(self, config: PeftConfig) -> bool:
        return True

    def init(self, p: View) -> None:
        assert isinstance(p.config, AdamssConfig)
        U, VT, groups = p.found or decomposed(p.site, p.config)
        p.found.clear()
        p.adamss_newB.copy_(VT)
        p.place.copy_(torch.cat(groups).argsort())
        for i, group in enumerate(groups):
            A, B = pair(p, i)
            if p.init_weights is None:
                kaiming(A)
                B.normal_(std=0.01)
            else:
                A.copy_(torch.linalg.svd(U[group], full_matrices=False)[2][: len(A)])
                B.zero_()

    def allocator(self, layers: Mapping[str, Holder], adapter: str) -> Allocator | None:
        config = next(iter(layers.values())).view(adapter).config
        assert isinstance(config, AdamssConfig)
        return SubspaceAllocator(layers, adapter, config) if config.use_asa else None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        return p.adamss_newB[:, : p.site.columns], self._rows(p)

    def delta_bias(self, p: View) -> Tensor | None:
        return self._rows(p) @ p.adamss_newB[:, -1] if p.site.has_bias else None

    def update(self, p: View, x: Tensor) -> Tensor:
        A, B = self.factors(p)
        y = through(p.site, x, A, B)
        return p.site.on_channels(lambda v: v + B @ p.adamss_newB[:, -1], y) if p.site.has_bias else y

    def _rows(self, p: View) -> Tensor:
        """All B_i A_i, each row in its place: `[out, r]`."""
        products = [B @ A for A, B in (pair(p, i) for i in range(len(p.groups)))]
        return torch.cat(products)[p.place]


def pair(p: View, i: int) -> tuple[Tensor, Tensor]:
    """A and B of a group."""
    return vars(p)[f"adamss_A_{i}"], vars(p)[f"adamss_B_{i}"]


def decomposed(site: Site, config: AdamssConfig) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U `[out, r]` and V^T of [W | b], and the groups of rows. On the CPU, so that every machine finds the same."""
    W, b = site.read()
    whole = (W.flatten(1) if b is None else torch.cat([W.flatten(1), b[:, None].to(W.dtype)], 1)).detach().float().cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.random_seed)
        U, _, V = torch.svd_lowrank(whole, q=min(config.r, *whole.shape))
    labels = grouped(U, min(config.num_subspaces, len(U)))
    return U, V.T, [(labels == i).nonzero()[:, 0] for i in range(int(labels.max()) + 1)]


def grouped(U: Tensor, count: int) -> Tensor:
    """The group of each row."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise DependencyError("AdaMSS groups rows by scikit-learn's k-means: pip install scikit-learn") from error
    return torch.as_tensor(KMeans(n_clusters=count, **KMEANS).fit(U.numpy()).labels_)


def rank_of(rows: Tensor, config: AdamssConfig) -> int:
    """A group's k."""
    most = min(config.subspace_rank, *rows.shape)
    if not config.use_dynamic_rank:
        return most
    energy = torch.linalg.svdvals(rows).square()
    return max(1, min(most, int((energy > config.svd_threshold * energy[0]).sum())))
