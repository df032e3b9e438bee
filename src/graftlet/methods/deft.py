# SPDX-License-Identifier: Apache-2.0
"""DEFT: decompositional efficient fine-tuning (arXiv 2509.22793).   W' = W - Q (V^T W) + s Q R,   s = alpha / r, or 1

What W gives inside a subspace is taken out, and a low rank put there instead. `deft_P` `[out, r]` spans it: with relu,
Q = P and V = relu(P); with qr, Q = V is an orthonormal basis of P. R is `[r, in]`; with `para` there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Rewrite, Spec, Stage, View, Weights
from ..errors import StartWarning, warn
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import check_dropout


@dataclass(kw_only=True)
class DeftConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """DEFT.

    Args:
        r: the subspace's dimension. alpha: with r, the scaling of what is put in; None for none.
        decomposition_method: "relu" or "qr": what takes out. para: take out only.
        deft_dropout: dropout on the input of what is put in.
        init_weights: True (R undoes what is taken out: no change at first) or False (random R, times init_scale).
        bias: train the base's biases: "none", "all", or "deft_only" (of adapted layers).
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}; a positive number is needed.")
        self.require(self.alpha is None or self.alpha > 0, f"alpha={self.alpha}; a positive number or None is needed.")
        self.require(0 <= self.deft_dropout < 1, f"deft_dropout={self.deft_dropout}; allowed: 0 up to, not with, 1.")
        self.require(self.bias in ("none", "all", "deft_only"), f"bias={self.bias!r}; allowed: none, all, deft_only.")


@method("deft", DeftConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class DEFT(Rewrite):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, DeftConfig)
        check_dropout(site, key, "deft_dropout", config.deft_dropout)
        fits = config.decomposition_method == "relu" or config.r <= site.features_out
        config.require(
            fits, f"r={config.r} exceeds the {site.features_out} outputs of {key!r}, of which qr makes a basis."
        )
        return {
            "deft_scaling": 1.0 if config.alpha is None else config.alpha / config.r,
            "deft_dropout": nn.Dropout(config.deft_dropout) if config.deft_dropout else nn.Identity(),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        P = {"deft_P": Spec((site.features_out, p.r))}
        return P if p.para else {**P, "deft_R": Spec((p.r, site.columns))}

    def init(self, p: View) -> None:
        p.deft_P.normal_(std=0.02)
        if p.para:
            if p.init_weights:
                warn(StartWarning, "DeftConfig.para=True: a new adapter changes the model, as it only takes out.")
        elif p.init_weights:
            _, V = bases(p)
            W = p.site.read()[0].to(V.dtype)
            p.deft_R.copy_(V.mT @ W.flatten(W.dim() - len(p.site.kernel) - 1) / p.deft_scaling)
        else:
            p.deft_R.normal_(std=0.02 * p.init_scale)

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        Q, V = bases(p)
        change = -(V.T.to(W.dtype) @ W.flatten(1))
        if not p.para:
            change = change + p.deft_scaling * p.deft_R
        return W + (Q.to(W.dtype) @ change).reshape(W.shape), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """Done on the output where that is the original weight's: y - Q V^T (y - b) + s Q R x."""
        if not before.pristine or p.site.opaque or p.site.groups > 1:
            return self._rewritten(p, x, before)
        (Q, V), y, b = bases(p), before(x), before.bias()
        plain = p.cast(y if b is None else p.site.on_channels(lambda v: v - b, y))
        change = -p.site.mix(plain, V.T)
        if not p.para:
            R = p.deft_R.unflatten(1, (-1, *p.site.kernel))
            change = change + p.deft_scaling * p.site.op(self._drop(p, x), R)
        return y + p.site.mix(change, Q)

    def _drop(self, p: View, x: Tensor) -> Tensor:
        return p.deft_dropout(p.cast(x)) if x.is_floating_point() else x

    def _rewritten(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """By the weight. Dropout changes what R is given alone."""
        y = super().forward(p, x, before)
        if p.para or p.site.opaque or not p.training or isinstance(p.deft_dropout, nn.Identity):
            return y
        QR = (p.deft_scaling * bases(p)[0] @ p.deft_R).reshape(before.origin()[0].shape)
        x = p.cast(x)
        return y + p.site.op(self._drop(p, x) - x, QR)


def bases(p: View) -> tuple[Tensor, Tensor]:
    """Q, where things are put, and V, from where they are taken: `[out, r]`."""
    if p.decomposition_method == "relu":
        return p.deft_P, p.deft_P.relu()
    Q = torch.linalg.qr(p.deft_P.to(torch.promote_types(p.deft_P.dtype, torch.float32)))[0].to(p.deft_P.dtype)
    return Q, Q
