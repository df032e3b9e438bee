# SPDX-License-Identifier: Apache-2.0
"""What the reference's users ask of engines and quantised weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ..core.host import bare
from ..errors import UnsupportedLayerError
from ..weights.site import site_of
from ..weights.storage import storage_of


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed keeps parameters in shards in this process."""
    if importlib.util.find_spec("deepspeed") is None:
        return False
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Let parameters that DeepSpeed keeps in shards be whole until the block ends."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Until the block ends, modules are made without memory: their parameters on meta, and their buffers if asked."""
    from accelerate import init_empty_weights as empty

    with empty(include_buffers=bool(include_buffers)):
        yield


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """A layer's weight as an ordinary parameter, in the layer's own layout; the parameter itself where it is not packed.

    Raises `UnsupportedLayerError` for modules without a weight that can be read.
    """
    layer = bare(module)
    site = site_of(layer)
    if site is None:
        raise UnsupportedLayerError(f"{type(layer).__name__} has no weight that can be read.")
    storage = storage_of(layer, site.name)
    held = getattr(layer, site.name)
    if not storage.backend and isinstance(held, nn.Parameter):
        return held
    return nn.Parameter(storage.read(layer, site.name), requires_grad=False)


def get_bnb_param_type(param: torch.Tensor) -> Literal[False, "4bit", "8bit"]:
    """How bitsandbytes has packed a parameter; False where it has not."""
    names: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    for kind in type(param).__mro__:
        if kind.__name__ in names:
            return names[kind.__name__]
    return False


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Bring the keys and values of a transformers cache to the devices of the layers that they belong to."""
    places = getattr(model, "hf_device_map", None) or {}
    blocks = {name.rpartition(".")[2]: place for name, place in places.items() if name.rpartition(".")[2].isdigit()}
    for number, layer in enumerate(cache.layers):
        place = blocks.get(str(number), places.get(""))
        if place is not None and layer.keys is not None:
            layer.keys, layer.values = layer.keys.to(place), layer.values.to(place)
