# SPDX-License-Identifier: Apache-2.0
"""Quantised layers made ordinary ones: what is merged into these is not rounded to a few bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..weights.site import Embedding, Linear, Site, site_of
from .host import bare, hosts
from .layer import AdaptedLayer


@contextmanager
def dequantised(model: nn.Module) -> Iterator[None]:
    """Put an ordinary layer in the place of each quantised one, adapted or not; all are back if what follows fails.

    Raises `UnsupportedLayerError`, nothing changed, where a weight cannot be read.
    """
    adapted = {id(h.base_layer): h for _, h in hosts(model) if isinstance(h, AdaptedLayer)}
    found = [(m, site) for m in model.modules() if (site := _quantised(m)) is not None]
    for _, site in found:
        site.check_readable("dequantising")
    made: dict[int, tuple[nn.Module, nn.Module]] = {}
    try:
        for module, site in found:
            made[id(module)] = module, dense(site)
        _exchange(model, adapted, made)
        yield
    except BaseException:
        _exchange(model, adapted, {id(new): (new, old) for old, new in made.values()})
        raise


def _quantised(module: nn.Module) -> Site | None:
    site = site_of(module)
    return site if site is not None and not site.storage.exact and bare(module) is module else None


def _exchange(model: nn.Module, adapted: dict[int, AdaptedLayer], made: dict[int, tuple[nn.Module, nn.Module]]) -> None:
    for parent in list(model.modules()):
        for child, standing in parent._modules.items():
            if id(standing) in made:
                parent._modules[child] = made[id(standing)][1]
    for host in set(adapted.values()):
        site = site_of(host.base_layer)
        if site is not None and host.site.module is not host.base_layer:
            host.site = site


@torch.no_grad()
def dense(site: Site) -> nn.Module:
    """An ordinary layer with the weight of a quantised one, in the dtype that it computes in."""
    W, b = site.read()
    weight = nn.Parameter(site.kept(W).detach().clone(), requires_grad=False)
    if isinstance(site, Linear):
        made: nn.Module = nn.Linear(*reversed(weight.shape), bias=b is not None, device="meta")
    elif isinstance(site, Embedding):
        padding = cast(nn.Embedding, site.module).padding_idx
        made = nn.Embedding(*weight.shape, padding_idx=padding, device="meta")
    else:
        made = _shallow(site.module)
    made._parameters[site.name] = weight
    if b is not None and site.bias is not None:
        made._parameters[site.bias] = nn.Parameter(b.detach().to(weight.dtype, copy=True), requires_grad=False)
    return made.train(site.module.training)


def _shallow(module: nn.Module) -> nn.Module:
    """The same module with parameters of its own."""
    made = cast(nn.Module, object.__new__(type(module)))
    made.__dict__ = {**module.__dict__, "_parameters": dict(cast(dict[str, Tensor], module._parameters))}
    return made
