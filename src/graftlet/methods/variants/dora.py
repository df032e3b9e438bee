# SPDX-License-Identifier: Apache-2.0
"""DoRA: weight-decomposed adaptation (arXiv 2402.09353).   W' = m (W + dW) / |W + dW|

m holds one magnitude an output; the norm is over each output's weights and is a constant to the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.algebra import Thin
from ...core.group import Group
from ...core.kernel import kernels
from ...core.method import Rewrite, Spec, Stage, View, Weights
from ...core.settled import Lean, Settled, as_held
from ...weights.product import Product
from ...weights.site import Conv, Site
from ..parts.gained import WhileSame, gained, row_norms
from . import Wrapper, variant

Pair = tuple[Thin, Product]
MAGNITUDE = "lora_magnitude_vector.weight"


@variant("use_dora")
class DoRA(Wrapper, Rewrite):
    """The wrapper of any `Delta`."""

    law = "chain"
    excludes = ("lora_bias", "alora_invocation_tokens", "arrow_config")

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
        zero = torch.zeros(p.site.shape, device=p.site.device)
        return self.inner.apply(p, zero, None)[0]

    def stacked(self, name: str, spec: Spec, experts: int) -> tuple[int, ...]:
        return (experts, *spec.shape) if name == MAGNITUDE else self.inner.stacked(name, spec, experts)

    def unstacked(self, name: str, tensor: Tensor, experts: int) -> Tensor:
        return tensor if name == "lora_magnitude_vector" else self.inner.unstacked(name, tensor, experts)

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        adapted, b = self.inner.transform(p, W, b)
        gain = p.lora_magnitude_vector.flatten() / row_norm(adapted).detach()
        return p.site.on_out(lambda v: v * gain, adapted), b

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """The base's output, turned by the gain; what dropout takes away, it takes from the adapter's own part."""
        pair = self._pair(p, before)
        if pair is not None and not pair[0].rate:
            magnitude, norms = p.lora_magnitude_vector.flatten(), self._norms(p, before, pair)
            return gained(self.inner.forward(p, x, before), magnitude, before.bias(), norms)
        whole, gain = p.cast(x), self._gain(p, before)
        dropped = self.inner.drop(p, whole)
        y, update = before(x), self.inner.update(p, dropped)
        if dropped is whole:
            b = before.bias()
            plain = y if b is None else p.site.on_channels(lambda v: v - b, y)
        else:
            plain = p.site.op(dropped, before.weight()[0].to(dropped.dtype))
        return y + p.site.on_channels(lambda v: v * (gain - 1), plain) + p.site.on_channels(lambda v: v * gain, update)

    def grouped(self, views: Sequence[View], before: Stage) -> Group | None:
        group = self.inner.grouped(views, before)
        if group is None:
            return None
        return replace(group, gain=torch.stack([self._gain(p, before) for p in views]))

    def settled(self, p: View, before: Stage) -> Settled | None:
        found, b = self.inner.settled(p, before), before.bias()
        if found is None:
            return None
        gain = self._gain(p, before)
        return replace(found, gain=gain, shift=None if b is None else b - b * gain)

    def lean(self, p: View, before: Stage) -> Lean | None:
        run, pair, magnitude = self.inner.lean(p, before), self._pair(p, before), p.lora_magnitude_vector
        if not p.training or run is None or pair is None or pair[0].rate or not as_held(magnitude):
            return None
        (A, B, scale, _), (W, b, *_) = pair
        if not isinstance(W, Tensor):
            return None

        def turned(x: Tensor) -> Tensor | None:
            y = run(x)
            return y if y is None else gained(y, magnitude, b, row_norms(W, A, B, scale))

        return turned

    def _gain(self, p: View, before: Stage) -> Tensor:
        """The gain on the weight before, `[out]`."""
        return p.lora_magnitude_vector.flatten() / self._norms(p, before, self._pair(p, before))

    def _norms(self, p: View, before: Stage, pair: Pair | None) -> Tensor:
        """The norms of the rows of the weight before; under `DoraCaching` as found, while no tensor has changed since."""
        return _norms.get(p.lora_magnitude_vector, _mark(p, before), lambda: self._found_norms(p, before, pair))

    def _found_norms(self, p: View, before: Stage, pair: Pair | None) -> Tensor:
        if pair is None or not isinstance(W := pair[1].W, Tensor):
            return row_norm(self.inner.transform(p, before.weight()[0], None)[0]).detach()
        thin = pair[0]
        return row_norms(W, thin.A, thin.B, thin.scale)

    def _pair(self, p: View, before: Stage) -> Pair | None:
        """The update and the product that it goes with, where kernels may be used on both."""
        if torch.compiler.is_compiling() or not kernels():
            return None
        thin, product = self.inner.thin(p), before.product()
        return None if thin is None or product is None else (thin, product)


def row_norm(W: Tensor) -> Tensor:
    """The norm of each output's weights, `[out]`."""
    return W.flatten(1).norm(dim=1)


class DoraCaching:
    """Keep DoRA's norms in evaluation: each layer's is found once, not in every call, and its weight is not read again.

        with DoraCaching():             # until the block ends
            model(**inputs)
        DoraCaching()(enabled=True)     # from now on

    What was found is dropped when the adapter or the weight changes. In training nothing is kept.
    """

    on = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled, self._before = enabled, False

    def __call__(self, enabled: bool = True) -> None:
        _turn(enabled)

    def __enter__(self) -> DoraCaching:
        self._before = DoraCaching.on
        _turn(self.enabled)
        return self

    def __exit__(self, *exception: Any) -> None:
        _turn(self._before)


_norms = WhileSame()
"""The norms that are kept, by magnitude."""


def _turn(on: bool) -> None:
    DoraCaching.on = on
    if not on:
        _norms.clear()


def _mark(p: View, before: Stage) -> tuple[Any, ...] | None:
    """What norms depend on, by place and version; None where nothing is to be kept."""
    if not DoraCaching.on or p.training or torch.compiler.is_compiling() or not before.pristine:
        return None
    tensors = [*p.tensors().values(), p.site.weight]
    if any(t.is_inference() for t in tensors):
        return None
    return (p.scaling, id(p.site.weight), *((t.data_ptr(), t._version) for t in tensors))
