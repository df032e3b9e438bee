# SPDX-License-Identifier: Apache-2.0
"""DoRA: weight-decomposed adaptation (arXiv 2402.09353).   W' = m (W + dW) / |W + dW|

m holds one magnitude an output; the norm is over each output's weights and is a constant to the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.method import Rewrite, Spec, Stage, View, Weights
from ...weights.site import Conv, Site
from . import Wrapper, variant

MAGNITUDE = "lora_magnitude_vector.weight"


@variant("use_dora")
class DoRA(Wrapper, Rewrite):
    """The wrapper of any `Delta`."""

    law = "chain"
    excludes = ("lora_bias",)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        shape = (1, site.features_out, *[1] * len(site.kernel)) if isinstance(site, Conv) else (site.features_out,)
        magnitude = Spec(shape, disk="lora_magnitude_vector")
        return {**self.inner.params(site, p), MAGNITUDE: magnitude}

    def init(self, p: View) -> Tensor | None:
        rebased = self.inner.init(p)
        W = p.site.read()[0] if rebased is None else rebased
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        if p.site.stack:
            norm = (W + self._stack_delta(p)).norm(dim=2)
        else:
            norm = row_norm(self.inner.transform(p, W, None)[0])
        p.lora_magnitude_vector.copy_(norm.reshape(p.lora_magnitude_vector.shape))
        return rebased

    def _stack_delta(self, p: View) -> Tensor:
        zero = torch.zeros(p.site.shape, device=p.site.weight.device)
        return self.inner.apply(p, zero, None)[0]

    def stacked(self, name: str, spec: Spec, experts: int) -> tuple[int, ...]:
        return (experts, *spec.shape) if name == MAGNITUDE else self.inner.stacked(name, spec, experts)

    def unstacked(self, name: str, tensor: Tensor, experts: int) -> Tensor:
        return tensor if name == "lora_magnitude_vector" else self.inner.unstacked(name, tensor, experts)

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        adapted, b = self.inner.transform(p, W, b)
        gain = self._gain(p, adapted)
        return p.site.on_out(lambda v: v * gain, adapted), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """The base's output, turned by the gain; what dropout takes away, it takes from the adapter's own part."""
        W, b = before.weight()
        gain = self._gain(p, self.inner.transform(p, W, None)[0])
        whole = p.cast(x)
        dropped = self.inner.drop(p, whole)
        y, update = before(x), self.inner.update(p, dropped)
        if dropped is whole:
            plain = y if b is None else p.site.on_channels(lambda v: v - b, y)
        else:
            plain = p.site.op(dropped, W.to(dropped.dtype))
        return y + p.site.on_channels(lambda v: v * (gain - 1), plain) + p.site.on_channels(lambda v: v * gain, update)

    def _gain(self, p: View, adapted: Tensor) -> Tensor:
        return p.lora_magnitude_vector.flatten() / row_norm(adapted).detach()


def row_norm(W: Tensor) -> Tensor:
    """The norm of each output's weights, `[out]`."""
    return W.flatten(1).norm(dim=1)
