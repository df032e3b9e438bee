# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: vector bank low-rank adaptation (arXiv 2405.15179).   dW = B A,   pieces of A, B = Σ softmax(top-k logits) bank

A `[r, in]` and B `[out, r]` are cut into vectors of length v; each is a mixture of k of the N vectors of one trained bank
`[N, v]` that all layers share. A layer's own are the logits, `[r, in / v, N]` and `[out / v, r, N]`. A file for inference
alone may hold the k places and their weights in place of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Spec, View
from ..core.tensors import check_places
from ..errors import AdapterFileError, ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import LowRank


@dataclass(kw_only=True)
class VBLoRAConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """VB-LoRA.

    Args:
        r: the rank. num_vectors, vector_length: the bank's. vector_length must divide a layer's inputs and outputs.
        topk: how many vectors make a mixture.
        save_only_topk_weights: save the mixtures in place of the logits: a small file. Training from it goes on with the
            vectors that were chosen.
        vblora_dropout: dropout on the adapter's input.
        init_vector_bank_bound: the bank starts evenly between its minus and plus. init_logits_std: the logits' deviation.
        bias: train the base's biases: "none", "all", or "vblora_only" (of adapted layers).
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def check(self) -> None:
        for name in ("r", "num_vectors", "vector_length", "topk"):
            self.require(getattr(self, name) > 0, f"{name}={getattr(self, name)}; a positive number is needed.")
        rate, biases = self.vblora_dropout, ("none", "all", "vblora_only")
        self.require(self.topk <= self.num_vectors, f"topk={self.topk} exceeds num_vectors={self.num_vectors}.")
        self.require(0 <= rate < 1, f"vblora_dropout={rate}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in biases, f"bias={self.bias!r}; allowed: {', '.join(biases)}.")


@method("vblora", VBLoRAConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class VBLoRA(LowRank):
    dropout = "vblora_dropout"

    exact_start = False

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, VBLoRAConfig)
        v = config.vector_length
        if site.columns % v or site.features_out % v:
            raise ConfigError(
                f"vector_length={v} must divide the {site.columns} inputs and {site.features_out} outputs of {key!r}."
            )
        return {"vblora_dropout": input_dropout(site, key, "vblora_dropout", config.vblora_dropout)}

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        assert isinstance(config, VBLoRAConfig)
        return {"vblora_vector_bank": Spec((config.num_vectors, config.vector_length))}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(config, VBLoRAConfig)
        tensors["vblora_vector_bank"].uniform_(-config.init_vector_bank_bound, config.init_vector_bank_bound)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        v, N = p.vector_length, p.num_vectors
        return {
            "vblora_logits_A": Spec((p.r, site.columns // v, N)),
            "vblora_logits_B": Spec((site.features_out // v, p.r, N)),
        }

    def init(self, p: View) -> None:
        p.vblora_logits_A.normal_(std=p.init_logits_std)
        p.vblora_logits_B.normal_(std=p.init_logits_std)

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        A, B = mixtures(p, p.vblora_logits_A), mixtures(p, p.vblora_logits_B)
        return A.flatten(1), B.mT.flatten(0, 1)

    def pack(self, p: View, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not p.save_only_topk_weights:
            return tensors
        packed: dict[str, Tensor] = {}
        for key, logits in tensors.items():
            chosen, places = logits.topk(p.topk, -1)
            packed[f"{key}_topk_indices"] = places.to(smallest(p.num_vectors))
            packed[f"{key}_topk_weights"] = chosen.softmax(-1)[..., :-1].contiguous()  # they add up to 1
        return packed

    def unpack(self, p: View, given: dict[str, Tensor]) -> dict[str, Tensor]:
        held = {key: tensor for key, tensor in given.items() if "_topk_" not in key}
        for key in ("vblora_logits_A", "vblora_logits_B"):
            places, most = given.get(f"{key}_topk_indices"), given.get(f"{key}_topk_weights")
            if places is not None and most is not None:
                if places.shape != (*most.shape[:-1], most.shape[-1] + 1):
                    raise AdapterFileError(
                        f"{key}_topk_indices {tuple(places.shape)} does not go with the weights {tuple(most.shape)}, "
                        "which are one fewer."
                    )
                check_places(places, p.num_vectors, f"{key}_topk_indices")
                weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], -1)
                logits = weights.new_full((*weights.shape[:-1], p.num_vectors), -torch.inf)
                held[key] = logits.scatter(-1, places.long(), weights.log())
        return held


def mixtures(p: View, logits: Tensor) -> Tensor:
    """The bank's vectors, mixed by the largest logits."""
    chosen, places = logits.topk(p.topk, -1)
    return (chosen.softmax(-1)[..., None] * p.vblora_vector_bank[places]).sum(-2)


def smallest(count: int) -> torch.dtype:
    """The integers that files use for places among `count`."""
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return next(kind for kind in kinds if count <= torch.iinfo(kind).max)
