# SPDX-License-Identifier: Apache-2.0
"""Sparse matrices: values at places, a place an index into the matrix row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...weights.site import Site


def dense(values: Tensor, places: Tensor, site: Site) -> Tensor:
    """The matrix written out, in the shape of a site's weight (of one expert's, in a stack)."""
    shape = site.shape[1:] if site.stack else site.shape
    return values.new_zeros(shape.numel()).index_add_(0, places, values).reshape(shape)


def onto(W: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """A weight with the matrix added to it."""
    return W.flatten().index_add(0, places, values).reshape(W.shape)


def applied(x: Tensor, values: Tensor, places: Tensor, site: Site) -> Tensor:
    """The site's operation with the matrix.

    Few inputs are gathered place by place; for many, one dense product is faster than all those reads.
    """
    if not few(x, values, site):
        return site.op(x, dense(values.to(x.dtype) if x.is_floating_point() else values, places, site))
    return scattered(x, values, places // site.columns, places % site.columns, site.features_out)


def few(x: Tensor, values: Tensor, site: Site) -> bool:
    """Whether to go place by place: there are few inputs, and each is a row."""
    return not site.kernel and x.is_floating_point() and x[..., 0].numel() * values.numel() <= site.shape.numel()


def scattered(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, height: int) -> Tensor:
    """A matrix of `height` rows on x, place by place."""
    picked = x.index_select(-1, columns) * values
    shape = (*x.shape[:-1], height)
    return picked.new_zeros(shape).index_add_(-1, rows, picked)


def seeded_places(count: int, among: int, seed: int | None, stack: int = 0) -> Tensor:
    """The first `count` of a permutation of `among` places, the same for the same seed; one after another for a stack."""
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    drawn = [torch.randperm(among, generator=generator)[:count] for _ in range(max(1, stack))]
    return torch.stack(drawn) if stack else drawn[0]
