# SPDX-License-Identifier: Apache-2.0
"""FRoD: full-rank fine-tuning with rotational degrees (arXiv 2512.23485).   W = U diag(l0) V^T,   W' = U (diag(l) + S) V^T

Layers of one category, named by the last two parts of their paths, share V `[in, in]`: by a joint decomposition of all
their weights (higher-order generalised SVD) U has columns of length one on each. Learnt are l `[in]` and the values of
a sparse S off its diagonal, whose places a category shares too. U is not saved: a load finds it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Holder, Spec, View
from ..core.tensors import check_places
from ..errors import UnsupportedLayerError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Linear, Parameter, Site
from .parts.dropout import check_dropout
from .parts.joint import joint
from .parts.low_rank import shaped


@dataclass(kw_only=True)
class FrodConfig(Targets, Layers, Saves, FanInFanOut, PeftConfig):
    """FRoD.

    Args:
        sparse_rate: the share of S that is trained. projection_prng_key: the seed of its places.
        regularization_alpha: what keeps the joint decomposition well conditioned.
        save_projection: write V and the places into the file too; otherwise a load finds them again.
        frod_dropout: dropout on the adapter's input. init_weights: True (no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "frod_only" (of adapted layers).
        progressbar, runtime_offload_base_weight: kept in the format, without effect.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def check(self) -> None:
        self.require(0 <= self.frod_dropout < 1, f"frod_dropout={self.frod_dropout}; allowed: 0 up to, not with, 1.")
        self.require(0 <= self.sparse_rate <= 1, f"sparse_rate={self.sparse_rate}; allowed: 0 to 1.")
        self.require(
            self.regularization_alpha > 0, f"regularization_alpha={self.regularization_alpha}; give more than 0."
        )
        self.require(self.bias in ("none", "all", "frod_only"), f"bias={self.bias!r}; allowed: none, all, frod_only.")


@method("frod", FrodConfig, sites=(Linear, Conv1D, Conv, Attention, Parameter))
class FRoD(Delta):
    dropout = "frod_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, FrodConfig)
        check_dropout(site, key, "frod_dropout", config.frod_dropout)
        if site.stack:
            raise UnsupportedLayerError(
                f"FRoD cannot adapt {key!r}: a stack of experts has no V that they could share."
            )
        dropout = nn.Dropout(config.frod_dropout) if config.frod_dropout else nn.Identity()
        return {"frod_dropout": dropout, "places": places(config, site.columns)}

    def group(self, key: str) -> str:
        return "_".join(key.split(".")[-2:])

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, FrodConfig)
        sizes = {self.group(key): site.columns for key, site in sites.items()}
        for key, site in sites.items():
            n = sizes[self.group(key)]
            config.require(n == site.columns, f"{key!r} has {site.columns} inputs, another layer of its category {n}.")
        found, saved = dict[str, Spec](), config.save_projection
        for group, n in sorted(sizes.items()):
            found[f"frod_V/{group}"] = Spec.frozen((n, n), saved=saved)
            found[f"frod_s_indices/{group}"] = Spec.frozen((2, places(config, n)), torch.int64, saved)
            found[f"frod_s_size/{group}"] = Spec.frozen((2,), torch.int64, saved)
        return found

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        """The places, from one generator for all categories in their order. V stays zero until there are layers."""
        assert isinstance(config, FrodConfig)
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for group in sorted(name.partition("/")[2] for name in tensors if name.startswith("frod_V/")):
            V, indices = tensors[f"frod_V/{group}"], tensors[f"frod_s_indices/{group}"]
            if V.is_meta:
                continue
            off = (~torch.eye(len(V), dtype=torch.bool)).nonzero()
            indices.copy_(off[torch.randperm(len(off), generator=generator)[: indices.shape[1]]].T)
            tensors[f"frod_s_size/{group}"].fill_(len(V))
            V.zero_()

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        n = site.columns
        learnt = {"frod_lambda_l": Spec((n,)), "frod_lambda_s_values": Spec((p.places,))}
        return {**learnt, "frod_U": Spec.frozen((site.features_out, n)), "frod_start": Spec.frozen((n,))}

    def derived(self, config: PeftConfig) -> bool:
        return True

    def init(self, p: View) -> None:
        """What depends on V comes in `link`."""
        for tensor in (p.frod_U, p.frod_start, p.frod_lambda_s_values):
            tensor.zero_()
        p.frod_lambda_l.normal_(1, 0.1)
        if not p.init_weights:
            p.frod_lambda_s_values.normal_(0, 0.1)

    def check_loaded(self, p: View) -> None:
        check_places(p.frod_s_indices, p.site.columns, "frod_s_indices")

    @torch.no_grad()
    def link(self, layers: Mapping[str, Holder], adapter: str) -> None:
        groups: dict[str, list[View]] = {}
        for key, layer in layers.items():
            groups.setdefault(self.group(key), []).append(layer.view(adapter))
        for views in groups.values():
            V = views[0].frod_V
            if V.is_meta:
                continue  # it is in the file that is being loaded
            if new := not V.any():
                V.copy_(joint([weight(p) for p in views], views[0].regularization_alpha))
            for p in views:
                if not p.frod_start.is_meta and not p.frod_start.any():
                    start(p, V)
                if new and p.init_weights and not p.frod_lambda_l.is_meta:
                    p.frod_lambda_l.copy_(p.frod_start)

    def delta(self, p: View) -> Tensor:
        return shaped(p.site, p.frod_U @ core(p) @ p.frod_V.T)

    def update(self, p: View, x: Tensor) -> Tensor:
        if p.site.groups > 1:
            return super().update(p, x)
        h = p.site.op(x, p.frod_V.T.unflatten(1, (-1, *p.site.kernel)))
        return p.site.mix(p.site.mix(h, core(p)), p.frod_U)


def places(config: FrodConfig, n: int) -> int:
    """How many entries of S are trained."""
    return min(int(config.sparse_rate * n * n), n * (n - 1))


def core(p: View) -> Tensor:
    """diag(l - l0) + S: exactly zero at the start."""
    rows, columns = p.frod_s_indices
    return torch.diag(p.frod_lambda_l - p.frod_start).index_put(
        (rows, columns), p.frod_lambda_s_values, accumulate=True
    )


def weight(p: View) -> Tensor:
    """W as a matrix in single precision."""
    return p.site.read()[0].flatten(1).float()


def start(p: View, V: Tensor) -> None:
    """U and l0 of a layer. A direction that W does not have stays zero."""
    columns = torch.linalg.solve(V.float(), weight(p).T).T
    length = columns.norm(dim=0)
    there = length > 1e-6 * length.max()
    p.frod_start.copy_(torch.where(there, length, 0))
    p.frod_U.copy_(torch.where(there, columns / length, 0))
