# SPDX-License-Identifier: Apache-2.0
"""Watching a model run: each layer's input goes to a function as it comes, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...core.target import by_pattern, resolve, targets
from ...errors import ConfigError, listing
from ...registry import lookup
from ...weights.site import Linear, Site, site_of

Data = Iterable[Any] | Callable[[], Any]
"""Batches to call the model with, or a function that runs it."""

_NOTE = "_found_for_start"


def linear_layers(model: nn.Module, config: PeftConfig) -> dict[str, Site]:
    """The linear layers that a config means, by path."""
    entry = lookup(config.peft_type)
    found = {p.path: site_of(p.bare) for p in targets(model, config, resolve(config, entry, model))}
    return {path: site for path, site in found.items() if isinstance(site, Linear)}


@contextmanager
def watching(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Until the block ends, give `take` each of these layers' inputs, with the layer's path, before it runs."""

    def hook(path: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = next((a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)), None)
            if x is not None:
                take(path, x.detach())

        return see

    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for one batch: a mapping of arguments, a sequence of them, or one tensor."""
    if isinstance(batch, Mapping):
        return model(**on_device(model, batch))
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch's tensors on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def feed(model: nn.Module, data: Data) -> None:
    """Run the model over all of the data once: a function does it itself, batches are called one by one."""
    if callable(data):
        data()
        return
    for batch in data:
        call(model, batch)


def rank_of(config: Any, path: str) -> int:
    """The rank that a config gives a layer."""
    return by_pattern(config.rank_pattern, path, config.r)


def keep(site: Site, name: str, found: Any) -> None:
    """Leave what was found for a start on the layer, until the start uses it."""
    site.module.__dict__.setdefault(_NOTE, {})[name] = found


def kept(site: Site, name: str) -> Any:
    """What was found for a start on this layer; None where nothing was."""
    return site.module.__dict__.get(_NOTE, {}).get(name)


def used(site: Site, name: str) -> None:
    """Forget what was found."""
    notes = site.module.__dict__.get(_NOTE, {})
    notes.pop(name, None)
    if not notes:
        site.module.__dict__.pop(_NOTE, None)


def check_all_seen(layers: Iterable[str], seen: Iterable[str]) -> None:
    """Raise `ConfigError` where the data never reached a layer."""
    missed = sorted(set(layers) - set(seen))
    if missed:
        raise ConfigError(
            f"the data never reached {listing(missed, 4)}: give data that runs through every adapted layer, or exclude "
            "these layers."
        )
