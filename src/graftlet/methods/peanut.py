# SPDX-License-Identifier: Apache-2.0
"""PEANuT: weight-aware neural tweakers (arXiv 2410.01870).   W' = W + s f(W^T)^T,   f = B . decoders . encoders . act A

f is a small network that reads each input's weights, a row of W^T `[in, out]`: A `[r, out]` leads in, B `[out, r]` out.
Between them `depth` encoders and as many decoders `[r, r]`, each decoder's output added to what the encoder at its
level was given:

    h0 = act(A w),  hi = act(Ei hi-1);     g = hd,  g <- act(Dj g) + hd-j
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Excludes, Layers, PeftConfig, Saves, Targets
from ..core.method import Rewrite, Spec, Stage, View, Weights
from ..errors import listing, nearest
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site

_tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), _tanh_gelu),
    **dict.fromkeys(("silu", "swish"), F.silu),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "hardswish": F.hardswish,
    "laplace": lambda x: (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "tanh": torch.tanh,
}


@dataclass(kw_only=True)
class PeanutConfig(Targets, Excludes, Layers, Saves, PeftConfig):
    """PEANuT.

    Args:
        r: the network's width. depth: how many encoders, and decoders. act_fn: the activation, by transformers' name.
        scaling: what the change is multiplied by.
        init_weights: True (zero B: no change at first) or False (random).
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.depth >= 0, f"depth={self.depth}; 0 or more is needed.")
        known = self.act_fn in ACTIVATIONS
        self.require(
            known,
            f"act_fn={self.act_fn!r}{nearest(self.act_fn, ACTIVATIONS)} Allowed: {listing(sorted(ACTIVATIONS), 40)}.",
        )


@method("peanut", PeanutConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class PEANuT(Rewrite):
    def params(self, site: Site, p: View) -> dict[str, Spec]:
        inner = [f"peanut_{part}.{i}.weight" for part in ("encoders", "decoders") for i in range(p.depth)]
        return {
            "peanut_A.weight": Spec((p.r, site.features_out)),
            "peanut_B.weight": Spec((site.features_out, p.r)),
            **{name: Spec((p.r, p.r)) for name in inner},
        }

    def init(self, p: View) -> None:
        for factor in (p.peanut_A, p.peanut_B, *layers(p, "encoders"), *layers(p, "decoders")):
            bound = 1 / math.sqrt(factor.shape[-1])
            factor.uniform_(-bound, bound)
        if p.init_weights:
            p.peanut_B.zero_()

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        return W + tweak(p, W.flatten(1).T).T.reshape(W.shape), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """The network reads row by row: on an embedding only those that are looked up."""
        if not isinstance(p.site, Embedding):
            return super().forward(p, x, before)
        change = tweak(p, F.embedding(x, before.origin()[0].T.to(p.dtype)))
        scale = cast(Embedding, p.site).scale
        return before(x) + (change if scale is None else change * scale)


def tweak(p: View, rows: Tensor) -> Tensor:
    """s f(w) for rows w of W^T."""
    act = ACTIVATIONS[p.act_fn]
    states = [act(rows.to(p.peanut_A.dtype) @ p.peanut_A.T)]
    for encoder in layers(p, "encoders"):
        states.append(act(states[-1] @ encoder.T))
    h = states.pop()
    for decoder in layers(p, "decoders"):
        h = act(h @ decoder.T) + states.pop()
    return h @ p.peanut_B.T * p.scaling


def layers(p: View, part: str) -> list[Tensor]:
    """The weights of the encoders, or of the decoders."""
    return [vars(p)[f"peanut_{part}_{i}"] for i in range(p.depth)]
