# SPDX-License-Identifier: Apache-2.0
"""A prompt of keys and values: how large a model's are, and how they come into its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..errors import CallError, ConfigError
from .lead import Lead

HEADS = ("num_key_value_heads", "num_kv_heads")
SIZE = ("head_dim", "d_kv")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")


def size_of(text: Any, names: tuple[str, ...]) -> int | None:
    """The first of these sizes that a transformers config tells; the largest, where its layers differ."""
    for name in names:
        largest = 0
        for part in getattr(text, "per_layer_config", None) or [text]:
            value = getattr(part, name, None)
            largest = max(largest, value) if isinstance(value, int) else largest
        if largest:
            return largest
    return None


def sizes(text: Any, dim: int, queries: int | None) -> dict[str, int | None]:
    """Heads, and their sizes together, of what a model keeps in its cache: with grouped queries fewer heads than there
    are queries, maybe of a size of their own. Raises `ConfigError` where keys and values are not alike."""
    shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    heads = 1 if shared else size_of(text, HEADS) or queries
    size = size_of(text, SIZE) or (dim // queries if queries else None)
    layers, below = size_of(text, LAYERS), size_of(text, DECODER_LAYERS)
    values = getattr(text, "v_head_dim", None)
    if size is not None and values not in (None, size):
        raise ConfigError(
            f"this model's values have {values} entries a head, its keys another number; a prefix has one size for "
            "both. Use prompt tuning."
        )
    return {
        "num_layers": layers if below is None else max(layers or 0, below),
        "num_attention_heads": heads,
        "token_dim": None if heads is None or size is None else heads * size,
    }


def length(cache: Any) -> int:
    """How many tokens a cache holds, whichever kind of one it is; a cache of states does not know."""
    if cache is None or only_states(cache):
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache)


def begun(cache: Any) -> bool:
    """Whether a cache holds anything."""
    told = getattr(cache, "has_previous_state", None)
    if isinstance(told, bool):
        return told  # 4.x's caches of states and keys, whose length says nothing while they are empty
    if only_states(cache):
        return bool(told()) if callable(told) else False
    return length(cache) > 0


def only_states(cache: Any) -> bool:
    kinds = getattr(cache, "is_linear", None)
    return isinstance(kinds, list) and bool(kinds) and all(kinds)


def check_room(cache: Any) -> None:
    """Raise `CallError` for a cache of a fixed size, which is counted for the caller's tokens alone."""
    from transformers import StaticCache

    own = getattr(cache, "self_attention_cache", cache)
    if isinstance(own, StaticCache):
        raise CallError(
            f"a {type(own).__name__} has no room for a prompt; leave cache_implementation out, or give 'dynamic'."
        )


def check_kind(base: Any) -> None:
    """Raise `ConfigError` for a model whose cache a prefix cannot go into."""
    from transformers import DynamicCache, cache_utils

    if (getattr(base, "tp_size", None) or 1) > 1:
        raise ConfigError(
            "tensor parallelism gives each process the keys and values of its own heads, and a prefix has those of all; use "
            "prompt tuning, or FSDP2."
        )
    if only_states(DynamicCache(config=base.config)):
        raise ConfigError(
            f"{type(base).__name__} keeps no keys and values, which a prefix goes before; use prompt tuning."
        )
    if getattr(base, "_is_stateful", False) and not hasattr(cache_utils, "LinearAttentionLayer"):
        raise ConfigError(
            f"{type(base).__name__} keeps states in a cache of its own, which this version of transformers makes "
            "itself; use prompt tuning, or transformers 5."
        )


def filled(model: Any, lead: Lead, cache: Any = None) -> Any:
    """A cache that begins with a batch's prompts: the one given, which is empty, or a new one."""
    from transformers import DynamicCache, EncoderDecoderCache

    base, config = model.base_model, lead.parts[0].config
    text = text_config(base)
    two = bool(getattr(base.config, "is_encoder_decoder", False))
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if two else DynamicCache(config=base.config)
    check_room(cache)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    rows = lead.stacked(lambda part: part.encoder.rows().expand(lead.rows(part), -1, -1))
    rows = rows.to(getattr(base, "dtype", rows.dtype))
    devices = layer_devices(getattr(base, "hf_device_map", None))
    for index, (keys, values) in enumerate(pairs(rows, config)):
        if takes(own, index):
            heads, size = shape(text, index, keys)
            k, v = (x[:, :heads, :, :size].to(device=devices(index)) for x in (keys, values))
            own.update(k, v, index)
    return cache


def pairs(rows: Tensor, config: PromptLearningConfig) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values, `[batch, heads, tokens, size]`, out of a batch's prompts `[batch, tokens, width]`."""
    layers, heads = config.num_layers or 0, config.num_attention_heads or 1
    parts = rows.unflatten(2, (2 * layers, heads, -1)).permute(2, 0, 3, 1, 4)
    # the format counts as if each layer of an encoder-decoder had a cross attention with parts of its own
    step = 2 * (config.num_transformer_submodules or 1)
    places = [step * index % len(parts) for index in range(layers)]
    return [(parts[place], parts[place + 1]) for place in places]


def takes(cache: Any, index: int) -> bool:
    """Whether a layer keeps keys and values of its own: not one that has a state, or that reads another layer's."""
    from transformers.cache_utils import CacheLayerMixin

    layers = cache.layers
    return not layers or cache_grows(cache) or (index < len(layers) and isinstance(layers[index], CacheLayerMixin))


def cache_grows(cache: Any) -> bool:
    """Whether a cache makes its layers as they come."""
    return getattr(cache, "layer_class_to_replicate", None) is not None


def shape(text: Any, index: int, keys: Tensor) -> tuple[int, int]:
    """Heads and their size on one layer; a prompt is as wide as the widest."""
    parts = getattr(text, "per_layer_config", None)
    if not parts:
        return keys.shape[1], keys.shape[3]
    return size_of(parts[index], HEADS) or keys.shape[1], size_of(parts[index], SIZE) or keys.shape[3]


def text_config(base: nn.Module) -> Any:
    """The config of the part of a model that has the text."""
    config: Any = base.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layer_devices(spread: dict[str, Any] | None) -> Any:
    """Where each layer of a model computes, by its number: a function that says None where all are in one place.

    spread: what accelerate keeps as `hf_device_map`. What it offloads is computed on the first accelerator.
    """
    if not spread or len({str(d) for d in spread.values()}) < 2:
        return lambda index: None
    real = [d for d in spread.values() if str(d) not in ("cpu", "disk")]
    main = real[0] if real else "cpu"
    found: dict[int, Any] = {}
    for path, device in spread.items():
        number = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if number is not None:
            found.setdefault(number, torch.device(device if device in real else main))
    return lambda index: found.get(index)
