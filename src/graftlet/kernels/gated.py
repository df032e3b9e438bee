# SPDX-License-Identifier: Apache-2.0
"""Backward of a gated product `act(a) b` and of the layer that it goes into, as one: the product is made again on the way."""

from __future__ import annotations

import torch
from torch import Tensor

Pulled = tuple[Tensor, tuple[Tensor, ...]]


def pulled(name: str, d: Tensor, a: Tensor, b: Tensor) -> Pulled:
    """The product of a and b, and their gradients from its own, `d [n, m]`: all written over what was given, on CUDA.

    name: the activation, `silu` or `gelu`. A second backward through the same graph is refused by torch, as what it would
    read is gone.
    """
    a, b = (t if t.is_contiguous() else t.contiguous() for t in (a, b))
    if not d.is_meta:
        from .gated_triton import pulled as kernel

        with torch.cuda.device(d.device):
            kernel(name == "gelu", d, a, b)
        torch.autograd.graph.increment_version((a, b))
    return d, (a, b)
