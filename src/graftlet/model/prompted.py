# SPDX-License-Identifier: Apache-2.0
"""A call with a prompt in it: embeddings before the input, or keys and values in the cache, and all else to match.

What a caller gives, masks and positions too, is about the caller's own tokens, in the first call and in those that go on
from a cache. The base model stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Cache, Prompt
from ..errors import CallError
from . import prefix

CACHES = ("cache", "past_key_values")
"""What the models of transformers call their cache; 5.x renames it."""


def call(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A forward with the active prompt in it."""
    base = model.base_model
    given = bound(model, args, kwargs)
    if model._prompt_off:
        return base(**given)
    encoder = active(model)
    own = {name: given.pop(name) for name in encoder.takes if name in given}
    name = cache_name(model)
    if name is not None and prefix.begun(given.get(name)):
        return base(**continued(model, given, name))
    if isinstance(encoder, Cache):
        output = base(**with_cache(model, given))
        unasked = given.get("use_cache") is False and (name is None or given.get(name) is None)
        return without(output, name) if unasked else output
    return encoder.finish(base(**with_embeddings(model, given, own)), own)


def without(output: Any, name: str | None) -> Any:
    """An output less its cache: a model gives back the one it was given, also where no cache is asked for."""
    if not isinstance(output, dict) or name not in output:
        return output
    return type(output)(**{key: value for key, value in output.items() if key != name})


def active(model: Any) -> Prompt:
    """The active adapter's encoder."""
    return model.prompt_encoder[model.active_adapter]


def parameters(base: nn.Module) -> tuple[str, ...]:
    """What a model's forward takes, in order."""
    return tuple(inspect.signature(base.forward).parameters)


def bound(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, the cache by the name that the model has for it now."""
    given = {**dict(zip(model._base_takes, args, strict=False)), **kwargs}
    name = cache_name(model)
    for other in CACHES:
        if name is not None and other != name and other in given:
            given[name] = given.pop(other)
    return given


def cache_name(model: Any) -> str | None:
    """What the base's forward calls its cache; None where it has none."""
    return next((n for n in CACHES if n in model._base_takes), None)


def continued(model: Any, given: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a call that goes on from a cache, which holds the prompt already."""
    made, seq2seq = dict(given), is_seq2seq(model)
    count = tokens(model)
    if seq2seq and not isinstance(active(model), Cache):
        return encoded(made, count)  # the prompt is the encoder's; the decoder's tokens are the caller's alone
    front = "decoder_" if seq2seq else ""
    first = given_input(made, front)
    if first is not None:
        _grow_to(made, f"{front}attention_mask", count, prefix.length(given[name]) + first.shape[1])
    _shift(made, f"{front}position_ids", count)
    _shift(made, "cache_position", count)
    return made


def encoded(made: dict[str, Any], count: int) -> dict[str, Any]:
    """The arguments of a call whose encoder has run: its mask covers all that the encoder saw."""
    if (outputs := made.get("encoder_outputs")) is not None:
        _grow_to(made, "attention_mask", count, outputs[0].shape[1])
    return made


def with_embeddings(model: Any, given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the prompt before the input's embeddings.

    Masks and token types grow in front, positions move up, labels of tokens get ignored ones; the labels of a whole
    sequence stay. Of an encoder-decoder the encoder gets the prompt.
    """
    made, seq2seq, count = dict(given), is_seq2seq(model), tokens(model)
    if made.get("encoder_outputs") is not None:
        return encoded(made, count)
    if not seq2seq and (name := cache_name(model)) is not None:
        prefix.check_room(made.get(name))
    grown_input(model, made, own)
    if not seq2seq:
        _shift(made, "cache_position", count, start=True)
        _move_labels(active(model), made, count)
    return made


def grown_input(model: Any, made: dict[str, Any], own: dict[str, Any]) -> None:
    """Put the prompt into a call's input, with its mask, its token types and its positions."""
    ids, embeds = made.pop("input_ids", None), made.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise CallError("give input_ids or inputs_embeds, one of the two, to a model with a prompt.")
    embeds = model.base_model.get_input_embeddings()(ids) if embeds is None else embeds
    count, batch = tokens(model), embeds.shape[0]
    rows = active(model).prompt(batch, own)[:, :count]
    made["inputs_embeds"] = torch.cat([rows.to(embeds), embeds], 1)
    _grow(made, "attention_mask", count, 1)
    _grow(made, "token_type_ids", count, 0)
    _shift(made, "position_ids", count, start=True)


def _move_labels(encoder: Prompt, made: dict[str, Any], count: int) -> None:
    batch, length = made["inputs_embeds"].shape[0], made["inputs_embeds"].shape[1] - count
    labels = made.get("labels")
    if isinstance(labels, Tensor) and labels.shape[:2] == (batch, length):
        made["labels"] = torch.cat([encoder.labels(labels, count), labels], 1)
    for name in ("start_positions", "end_positions"):
        if isinstance(made.get(name), Tensor):
            made[name] = made[name] + count


def with_cache(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the prompt's keys and values in the cache (of the decoder, where there is one)."""
    base, made = model.base_model, dict(given)
    if base.training and checkpoints(base):
        raise CallError(
            f"{model.peft_type} lives in the cache, which gradient checkpointing switches off; train without it "
            "(model.gradient_checkpointing_disable())."
        )
    first = given_input(made, "")
    first = (made.get("encoder_outputs") or [None])[0] if first is None else first
    if first is None:
        raise CallError("give input_ids or inputs_embeds to a model with a prefix.")
    name, count = cache_name(model), tokens(model)
    assert name is not None  # a model without a cache gets no prefix
    made[name] = prefix.filled(model, first.shape[0], made.get(name))
    front = "decoder_" if is_seq2seq(model) else ""
    _grow(made, f"{front}attention_mask", count, 1)
    _shift(made, f"{front}position_ids", count)
    _shift(made, "cache_position", count)
    return made


def prompt(model: Any, batch: int, task_ids: Tensor | None = None) -> Any:
    """What the active method puts before each row: embeddings `[batch, n, dim]`, or a cache."""
    encoder = active(model)
    if isinstance(encoder, Cache):
        return prefix.filled(model, batch)
    return encoder.prompt(batch, {} if task_ids is None else {"task_ids": task_ids})


def tokens(model: Any) -> int:
    """How many tokens the active prompt has."""
    return model.active_peft_config.num_virtual_tokens


def given_input(made: dict[str, Any], front: str) -> Tensor | None:
    """A call's input: ids or embeddings."""
    return next((v for n in ("input_ids", "inputs_embeds") if isinstance(v := made.get(front + n), Tensor)), None)


def _grow(made: dict[str, Any], name: str, count: int, value: int) -> None:
    old = made.get(name)
    if isinstance(old, Tensor) and old.dim() == 2:
        made[name] = torch.cat([old.new_full((old.shape[0], count), value), old], 1)
    elif old is not None:
        shape = tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__
        raise CallError(f"{name} of a model with a prompt is [batch, tokens]; {shape} was given.")


def _grow_to(made: dict[str, Any], name: str, count: int, length: int) -> None:
    """Let a mask cover the prompt too, unless it does."""
    old = made.get(name)
    if isinstance(old, Tensor) and old.dim() == 2 and old.shape[1] + count == length:
        _grow(made, name, count, 1)


def _shift(made: dict[str, Any], name: str, count: int, start: bool = False) -> None:
    """Positions moved up by the prompt, whose own come first where it is part of the input."""
    old = made.get(name)
    if isinstance(old, Tensor):
        own = torch.arange(count, device=old.device, dtype=old.dtype).expand(*old.shape[:-1], -1)
        made[name] = torch.cat([own, old + count], -1) if start else old + count


def is_seq2seq(model: Any) -> bool:
    return bool(getattr(model.base_model.config, "is_encoder_decoder", False))


def checkpoints(base: Any) -> bool:
    """Whether a transformers model recomputes its activations; 5.x calls that another name than 4.x."""
    known = (
        "is_activation_checkpointing" if hasattr(base, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return bool(getattr(base, known, False))


Run = Callable[..., Any]
"""A model's forward."""
