# SPDX-License-Identifier: Apache-2.0
"""GLoRA: generalised LoRA (arXiv 2306.07967).   W' = W + W * A + B,   b' = b + b * D + E + W C

Each of A, B (of W's shape), C (`[in, 1]`), D and E (`[out]`) is a low-rank product Xd Xu, a vector or a constant X, or
none. C, D and E need a bias to act on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import PeftConfig, Saves, Targets
from ..core.method import Rewrite, Spec, View, Weights
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site


@dataclass(kw_only=True)
class GloraConfig(Targets, Saves, PeftConfig):
    """GLoRA.

    Args:
        r: the rank of the low-rank ones. config_A_B: what A and B are: "lora", "vector", "constant" or "none".
        config_C: "lora", "vector" or "none". config_D_E: "vector", "constant" or "none".
        init_weights: True (no change at first) or False (random).
        bias: train the base's biases: "none", "all", or "glora_only" (of adapted layers).
    """

    r: int = 8
    bias: str = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.bias in ("none", "all", "glora_only"), f"bias={self.bias!r}; allowed: none, all, glora_only.")
        kinds = {self.config_A_B, self.config_C, self.config_D_E}
        self.require(kinds != {"none"}, "config_A_B, config_C and config_D_E are all 'none'; nothing is left to train.")


@method("glora", GloraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class GLoRA(Rewrite):
    def params(self, site: Site, p: View) -> dict[str, Spec]:
        p.config.require(
            site.has_bias or p.config_A_B != "none",
            f"config_A_B='none' leaves nothing to train on {p.key!r}, a layer without a bias.",
        )
        out, inner = site.features_out, site.columns
        found = {**path("A", p.config_A_B, (out, inner), p.r), **path("B", p.config_A_B, (out, inner), p.r)}
        if site.has_bias:
            found.update(path("C", p.config_C, (inner, 1), p.r))
            found.update({**path("D", p.config_D_E, (out,), p.r), **path("E", p.config_D_E, (out,), p.r)})
        return found

    def init(self, p: View) -> None:
        """Of a product Xd starts at zero, Xu does not."""
        for name, tensor in vars(p).items():
            if not name.startswith("glora_"):
                continue
            if name.endswith("Xu"):
                kaiming(tensor)
            elif p.init_weights:
                tensor.zero_()
            elif name.endswith("Xd"):
                kaiming(tensor)
            else:
                tensor.uniform_(-0.1, 0.1)

    def unpack(self, p: View, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in given.items() if not key.endswith(".zeros")}  # other writers' "none"

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        flat = W.flatten(1)
        A, B = value(p, "A"), value(p, "B")
        adapted = flat if A is None or B is None else torch.addcmul(flat + B, flat, A)
        if b is None:
            return adapted.reshape(W.shape), None
        C, D, E = value(p, "C"), value(p, "D"), value(p, "E")
        change = torch.zeros_like(b) if D is None or E is None else b * D + E
        return adapted.reshape(W.shape), b + (change if C is None else change + (flat @ C.to(flat.dtype))[:, 0])


def path(name: str, kind: str, shape: tuple[int, ...], r: int) -> dict[str, Spec]:
    """The tensors that make up A to E; a vector has an entry a row."""
    if kind == "lora":
        return {f"glora_{name}.Xd": Spec((shape[0], r)), f"glora_{name}.Xu": Spec((r, shape[1]))}
    shapes = {"vector": (shape[0], *[1] * (len(shape) - 1)), "constant": (1,)}
    return {f"glora_{name}.X": Spec(shapes[kind])} if kind in shapes else {}


def value(p: View, name: str) -> Tensor | None:
    """One of A to E as it stands in the formula; None where there is none."""
    held = vars(p)
    if f"glora_{name}_Xd" in held:
        return held[f"glora_{name}_Xd"] @ held[f"glora_{name}_Xu"]
    return held.get(f"glora_{name}_X")


def kaiming(tensor: Tensor) -> None:
    """Uniform, by the number of inputs."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    tensor.uniform_(-bound, bound)
