# SPDX-License-Identifier: Apache-2.0
"""Sparse matrices: values at places, a place an index into the matrix row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...weights.site import Site


def dense(values: Tensor, places: Tensor, site: Site) -> Tensor:
    """The matrix written out, in the shape of a site's weight (of one expert's, in a stack)."""
    shape = site.shape[1:] if site.stack else site.shape
    return values.new_zeros(shape.numel()).index_add(0, places, values).reshape(shape)


def applied(x: Tensor, values: Tensor, places: Tensor, site: Site) -> Tensor:
    """The site's operation with the matrix.

    Few inputs are gathered place by place; for many, one dense product is faster than all those reads.
    """
    many = x[..., 0].numel() * values.numel() > site.weight.numel()
    if many or site.kernel or not x.is_floating_point():
        return site.op(x, dense(values, places, site))
    rows, columns = places // site.columns, places % site.columns
    picked = x.index_select(-1, columns) * values
    shape = (*x.shape[:-1], site.features_out)
    return torch.zeros(shape, dtype=picked.dtype, device=picked.device).index_add(-1, rows, picked)
