# SPDX-License-Identifier: Apache-2.0
"""C3A: circular convolution adaptation (arXiv 2407.19342).   dW[o, i] = c[(i - o) mod b] / in, in b x b blocks

The kernel `[out / b, in / b, b]` holds the first row of each block; the rows below are that one turned. Applied by the
Fourier transform, in which a turned copy is a product: Y_m = sum over n of conj(C_mn) X_n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Layers, PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..core.target import by_pattern
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.low_rank import shaped


@dataclass(kw_only=True)
class C3AConfig(Targets, Layers, Saves, PeftConfig):
    """C3A.

    Args:
        block_size: a common divisor of a layer's inputs and outputs. block_size_pattern: others for layers whose path
            ends in a key (a regex).
        init_weights: "xavier_uniform" (as False), "kaiming_uniform", "gaussian", or True (zeros: no change at first).
        bias: train the base's biases: "none", "all", or "c3a_only" (of adapted layers).
    """

    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = "xavier_uniform"

    def check(self) -> None:
        for name, size in {"block_size": self.block_size, **(self.block_size_pattern or {})}.items():
            self.require(size > 0, f"block size {name}={size}; a positive number is needed.")
        self.require(self.bias in ("none", "all", "c3a_only"), f"bias={self.bias!r}; allowed: none, all, c3a_only.")


@method("c3a", C3AConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class C3A(Delta):
    exact_start = False

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, C3AConfig)
        size = by_pattern(config.block_size_pattern, key, config.block_size)
        if site.columns % size or site.features_out % size:
            common = math.gcd(site.columns, site.features_out)
            raise ConfigError(
                f"block_size={size} must divide the {site.columns} inputs and {site.features_out} outputs of {key!r}: "
                f"any divisor of {common} does. Give it in block_size_pattern."
            )
        return {"block_size": size}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        return {"c3a_kernel": Spec((site.features_out // p.block_size, site.columns // p.block_size, p.block_size))}

    def init(self, p: View) -> None:
        inputs, outputs = p.site.columns, p.site.features_out
        if p.init_weights is True:
            p.c3a_kernel.zero_()
        elif p.init_weights == "gaussian":
            p.c3a_kernel.normal_()
        else:
            bound = math.sqrt(1 / inputs if p.init_weights == "kaiming_uniform" else 6 / (inputs + outputs))
            p.c3a_kernel.uniform_(-bound, bound)

    def delta(self, p: View) -> Tensor:
        place = torch.arange(p.block_size, device=p.c3a_kernel.device)
        blocks = p.c3a_kernel[:, :, (place - place[:, None]) % p.block_size]  # [m, n, o, i]
        return shaped(p.site, blocks.transpose(1, 2).flatten(2).flatten(0, 1) / p.site.columns)

    def update(self, p: View, x: Tensor) -> Tensor:
        if p.site.kernel or not x.is_floating_point():
            return super().update(p, x)
        wide = torch.promote_types(x.dtype, torch.float32)
        X = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, p.block_size)))
        C = torch.fft.rfft(p.c3a_kernel.to(wide)).conj()
        Y = torch.einsum("...nf,mnf->...mf", X, C)
        return torch.fft.irfft(Y, p.block_size).flatten(-2) / p.site.columns
