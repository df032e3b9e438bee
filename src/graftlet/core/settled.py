# SPDX-License-Identifier: Apache-2.0
"""One adapter in inference: the linear layer's own output, and into it two thin products with tensors that are at hand.

In eager decoding a layer's time is the host's: what there is to find out about a layer and its adapter is found out once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settled:
    """An adapter that makes `(y + scale (x A) B) gain + (b - b gain)` of a linear layer's output `y = x W^T + b`.

    A: `[in, r]`. B: `[r, out]`; the adapter's own tensors, until it is made `ready`. gain: `[out]`, or None. shift:
    `b - b gain`, or None where that is nothing.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    gain: Tensor | None = None
    shift: Tensor | None = None

    def ready(self, dtype: torch.dtype) -> Settled:
        """The same with tensors of its own, for inputs of a dtype."""
        B = self.B if self.gain is None else self.B * self.gain
        return replace(self, A=self.A.to(dtype), B=B.to(dtype))

    def on(self, y: Tensor, x: Tensor) -> Tensor:
        """What the adapter makes of the layer's output `y [..., out]`, which is written over, for its input `x [..., in]`."""
        if self.gain is not None:
            y.mul_(self.gain)
        if self.shift is not None:
            y.add_(self.shift)
        h = x.reshape(-1, x.shape[-1]) @ self.A.to(x.dtype)
        y.view(-1, y.shape[-1]).addmm_(h, self.B.to(x.dtype), alpha=self.scale)
        return y
