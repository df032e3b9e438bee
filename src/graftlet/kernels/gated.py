# SPDX-License-Identifier: Apache-2.0
"""Backward of a gated product `act(a) b` and of the layer that it goes into, as one: the product is made again on the way.

And so are sums over rows that the layers around it ask for, while what they are of is at hand: a model's widest tensors, each
of which is read once and written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.kernel import HALVES, in_triton, kind_of, on_device_of
from .recipe import Pulled, Thin

LARGEST = 64
"""The largest rank that the tiles are made for."""
PARTS = 8
"""Into how many parts the rows are cut, so that all processors have something to do."""


def pulled(name: str, d: Tensor, dh: Tensor | None, thins: Sequence[Thin | None], parts: tuple[Tensor, ...]) -> Pulled:
    """The way back through `act(a) b`, written over what is given, on CUDA.

    name: the activation, `silu` or `gelu`. d: `[n, m]`, the product's gradient. A second backward through the same graph is
    refused by torch, as what it would read is gone.
    """
    a, b = (t if t.is_contiguous() else t.contiguous() for t in parts)
    ranks = [0 if h is None else h.shape[1] for h in (dh, *(t and t.h for t in thins))]
    if d.dtype == torch.float32 or max(ranks) > LARGEST:
        dh, thins, ranks = None, (None, None), [0, 0, 0]
    m, (r, *own) = d.shape[1], ranks
    sums = d.new_empty(PARTS, sum(ranks) * m, dtype=torch.float32)
    if not d.is_meta:
        from . import gated_triton as kernels

        with on_device_of(d):
            if any(ranks):
                kernels.woven(name == "gelu", d, a, b, dh, thins, sums)
            else:
                kernels.pulled(name == "gelu", d, a, b)
        torch.autograd.graph.increment_version((a, b))
    dA, *dBs = sums.sum(0).split([k * m for k in ranks])
    found = tuple(dB.view(m, k) if k else None for dB, k in zip(dBs, own, strict=True))
    return Pulled(None if r else d, dA.view(r, m) if r else None, (a, b), found)


def outer(dh: Tensor, words: Tensor | None, a: Tensor, b: Tensor) -> Tensor | None:
    """`dh^T (a b)` in single precision for `dh [n, r]` and `[.., m]` tensors of n rows; None where the plain way is as good.

    words: by which bits entries of the product are dropped, as in `dropped_triton`; None: none are.
    """
    (n, r), m = dh.shape, a.shape[-1]
    if kind_of(a) != "cuda" or a.dtype not in HALVES or r > LARGEST or not (a.is_contiguous() and b.is_contiguous()):
        return None
    kernels = None if a.is_meta else in_triton("gated_triton")
    if not n or (kernels is None and not a.is_meta):
        return None
    sums = dh.new_empty(PARTS, r, m, dtype=torch.float32)
    if kernels is not None:
        with on_device_of(a):
            kernels.outer(dh, words, a.view(n, m), b.view(n, m), sums)
    return sums.sum(0)
