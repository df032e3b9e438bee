# SPDX-License-Identifier: Apache-2.0
"""A call with a prompt in it: embeddings before the input, or keys and values in the cache; masks, positions and labels
to match; and generation.

The base model stays as it is: nothing is patched, for a call or for a generation.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..core.method import Cache
from ..errors import CallError, ConfigError

IGNORED = -100
"""The label that no loss looks at."""


def call(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A forward with the active prompt in it."""
    base = model.base_model
    given = bound(base, args, kwargs)
    if model._prompt_off or _continues(given):
        return base(**given)
    if isinstance(model.prompt_encoder[model.active_adapter], Cache):
        return base(**with_cache(model, given))
    return base(**with_embeddings(model, given))


def bound(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = list(inspect.signature(base.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _continues(given: dict[str, Any]) -> bool:
    """Whether the call goes on from a cache, which holds the prompt already."""
    cache: Any = given.get("past_key_values", given.get("cache"))
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else (len(cache) if cache else 0)
    return length > 0


def with_embeddings(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the prompt before the input's embeddings.

    Masks and token types grow in front, positions move up, labels of tokens get ignored ones; the labels of a whole
    sequence stay. Of an encoder-decoder the encoder gets the prompt.
    """
    made = dict(given)
    ids, embeds = made.pop("input_ids", None), made.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise CallError("give input_ids or inputs_embeds, one of the two, to a model with a prompt.")
    embeds = model.word_embeddings(ids) if embeds is None else embeds
    config = model.active_peft_config
    rows = model.prompt_encoder[model.active_adapter].rows()[: config.num_virtual_tokens]
    count, batch, length = rows.shape[0], embeds.shape[0], embeds.shape[1]
    made["inputs_embeds"] = torch.cat([rows.to(embeds).expand(batch, -1, -1), embeds], 1)
    _grow(made, ("attention_mask",), count, 1)
    _grow(made, ("token_type_ids",), count, 0)
    _shift(made, "position_ids", count, start=True)
    if not _is_seq2seq(model):
        labels = made.get("labels")
        if isinstance(labels, Tensor) and labels.shape[:2] == (batch, length):
            made["labels"] = torch.cat([labels.new_full((batch, count), IGNORED), labels], 1)
        for name in ("start_positions", "end_positions"):
            if isinstance(made.get(name), Tensor):
                made[name] = made[name] + count
    return made


def with_cache(model: Any, given: dict[str, Any], copies: int = 1) -> dict[str, Any]:
    """The arguments with the prompt's keys and values in the cache (of the decoder, where there is one)."""
    base, made = model.base_model, dict(given)
    if base.training and checkpoints(base):
        raise CallError(
            f"{model.peft_type} lives in the cache, which gradient checkpointing switches off; train without it "
            "(model.gradient_checkpointing_disable())."
        )
    first = next((v for k in ("input_ids", "inputs_embeds") if isinstance(v := made.get(k), Tensor)), None)
    if first is None:
        raise CallError("give input_ids or inputs_embeds to a model with a prefix.")
    count = model.active_peft_config.num_virtual_tokens
    seq2seq = _is_seq2seq(model)
    made[cache_name(base)] = key_values(model, first.shape[0] * copies)
    _grow(made, ("decoder_attention_mask",) if seq2seq else ("attention_mask",), count, 1)
    _shift(made, "decoder_position_ids" if seq2seq else "position_ids", count)
    return made


def cache_name(base: nn.Module) -> str:
    """What a model's forward calls its cache. Raises `ConfigError` where it has none."""
    names = inspect.signature(base.forward).parameters
    found = next((n for n in ("cache", "past_key_values") if n in names), None)
    if found is None:
        raise ConfigError(f"{type(base).__name__} has no key-value cache, which a prefix needs; use prompt tuning.")
    return found


def key_values(model: Any, batch: int) -> Any:
    """The prompt as a filled cache: each layer's keys and values `[batch, heads, tokens, size]`."""
    from transformers import DynamicCache, EncoderDecoderCache

    config = model.active_peft_config
    assert isinstance(config, PromptLearningConfig)
    rows = model.prompt_encoder[model.active_adapter].rows().to(model.base_model.dtype)
    parts = rows.reshape(rows.shape[0], -1, config.num_attention_heads or 1, rows.shape[1] // _width(config))
    parts = parts.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)
    cache = DynamicCache()
    for index in range(config.num_layers or 0):
        # the format counts as if each layer of an encoder-decoder had a cross attention with parts of its own
        place = 2 * index * (config.num_transformer_submodules or 1) % len(parts)
        cache.update(parts[place].contiguous(), parts[place + 1].contiguous(), index)
    return EncoderDecoderCache(cache, DynamicCache()) if _is_seq2seq(model) else cache


def _width(config: PromptLearningConfig) -> int:
    """How many vectors of a head's size one row of a prefix holds."""
    return 2 * (config.num_layers or 0) * (config.num_attention_heads or 1)


def prompt(model: Any, batch: int) -> Any:
    """What the active method puts before each row: embeddings `[batch, n, dim]`, or a cache."""
    encoder = model.prompt_encoder[model.active_adapter]
    return key_values(model, batch) if isinstance(encoder, Cache) else encoder.rows().expand(batch, -1, -1)


def _grow(made: dict[str, Any], names: tuple[str, ...], count: int, value: int) -> None:
    for name in names:
        old = made.get(name)
        if isinstance(old, Tensor) and old.dim() == 2:
            made[name] = torch.cat([old.new_full((old.shape[0], count), value), old], 1)
        elif old is not None:
            raise CallError(f"{name} of a model with a prompt is [batch, tokens]; {type(old).__name__} was given.")


def _shift(made: dict[str, Any], name: str, count: int, start: bool = False) -> None:
    """Positions moved up by the prompt, whose own come first where it is part of the input."""
    old = made.get(name)
    if isinstance(old, Tensor):
        own = torch.arange(count, device=old.device).expand(*old.shape[:-1], -1)
        made[name] = torch.cat([own, old + count], -1) if start else old + count


def _is_seq2seq(model: Any) -> bool:
    return bool(getattr(model.base_model.config, "is_encoder_decoder", False))


def checkpoints(base: Any) -> bool:
    """Whether a transformers model recomputes its activations; 5.x calls that another name than 4.x."""
    known = (
        "is_activation_checkpointing" if hasattr(base, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return bool(getattr(base, known, False))


# generation


def generate(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Generation with the active prompt in it, from `input_ids` (or `inputs_embeds`, for a soft prompt)."""
    given = dict(kwargs)
    if args:
        given["input_ids"] = args[0]
    if "inputs" in given:
        given["input_ids"] = given.pop("inputs")
    if model._prompt_off:
        return model.base_model.generate(**given)
    ids = given.get("input_ids")
    if isinstance(ids, Tensor) and given.get("attention_mask") is None:
        given["attention_mask"] = _mask(model.base_model, ids, given)
    if isinstance(model.prompt_encoder[model.active_adapter], Cache):
        return _generate_cached(model, given)
    return _generate_embedded(model, given)


def _generate_embedded(model: Any, given: dict[str, Any]) -> Any:
    """The first step sees the prompt and the input as embeddings; the ids given go on counting as what was there."""
    made = with_embeddings(model, given)
    if given.get("input_ids") is not None and not _is_seq2seq(model):
        made["input_ids"] = given["input_ids"]
        if "max_length" in made:  # counted without the prompt, which generate counts in
            made["max_length"] += model.active_peft_config.num_virtual_tokens
    return model.base_model.generate(**made)


def _generate_cached(model: Any, given: dict[str, Any]) -> Any:
    """The prefix is in the cache from the start. Ids stand in for it, since generate takes what is in the cache for a
    part of the ids; they are cut off again."""
    seq2seq, count = _is_seq2seq(model), model.active_peft_config.num_virtual_tokens
    name = "decoder_input_ids" if seq2seq else "input_ids"
    ids = given.get(name)
    if ids is None and seq2seq:
        ids = given["input_ids"].new_full((given["input_ids"].shape[0], 1), _start(model.base_model, given))
    if ids is None:
        raise CallError(f"generation with {model.peft_type} needs input_ids.")
    if seq2seq:
        given["decoder_attention_mask"] = given.get("decoder_attention_mask", torch.ones_like(ids))
    made = with_cache(model, given, copies=_copies(model.base_model, given))
    made["past_key_values"] = made.pop(cache_name(model.base_model))
    made[name] = torch.cat([ids[:, :1].expand(-1, count), ids], 1)
    for limit in ("max_length", "min_length"):
        if limit in made:
            made[limit] += count
    output = model.base_model.generate(**made)
    if isinstance(output, Tensor):
        return output[:, count:]
    output.sequences = output.sequences[:, count:]
    return output


def _copies(base: Any, given: dict[str, Any]) -> int:
    """How many rows generation makes of each row given."""
    setting = given.get("generation_config") or base.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(int(given.get(n) or getattr(setting, n, None) or 1) for n in names)


def _start(base: Any, given: dict[str, Any]) -> int:
    setting = given.get("generation_config") or base.generation_config
    for holder in (setting, base.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (found := getattr(holder, name, None)) is not None:
                return int(found)
    raise CallError("the model does not say its decoder_start_token_id; give decoder_input_ids.")


def _mask(base: Any, ids: Tensor, given: dict[str, Any]) -> Tensor:
    """The mask that generate would work out from the ids, which it cannot any more once there is a prompt."""
    setting = given.get("generation_config") or base.generation_config
    pad, end = getattr(setting, "pad_token_id", None), getattr(setting, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    if pad is None or pad in ends or not (ids == pad).any():
        return torch.ones_like(ids)
    return (ids != pad).long()
