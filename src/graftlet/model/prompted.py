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

from ..config import TaskType
from ..core.context import current
from ..core.prompt import CACHES, IGNORED, Cache
from ..errors import CallError
from . import prefix
from .lead import Lead, acting, active_lead, lead_of, own_of


def call(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A forward with prompts in it: the active one, or each row's own."""
    base = model.base_model
    given = bound(model, args, kwargs)
    own = taken(model, given)
    shared = {name: value for name, value in own.items() if name in model._base_takes}
    encoders = {} if model._prompt_off else acting(model)
    if not encoders:
        return base(**given, **shared)
    name = cache_name(model)
    if name is not None and prefix.begun(given.get(name)):
        return base(**continued(model, {**given, **shared}, name))
    if in_cache(model):
        output = base(**with_cache(model, given))
        unasked = given.get("use_cache") is False and (name is None or given.get(name) is None)
        return without(output, name) if unasked else output
    alone = None if mixed() else next(iter(encoders.values()))
    if alone is None and shared:
        raise CallError(
            f"{', '.join(shared)} cannot be given to a batch of several adapters, one of which ({', '.join(encoders)}) "
            "has its own use for it."
        )
    output = base(**with_embeddings(model, given, own))
    return output if alone is None else alone.finish(output, own)


def taken(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments that are for the prompts out of a call's."""
    names = dict.fromkeys(name for encoder in acting(model).values() for name in encoder.takes)
    found = {name: given.pop(name) for name in names if name in given}
    return {n: torch.as_tensor(v) if isinstance(v, (list, tuple)) else v for n, v in found.items()}


def mixed() -> bool:
    """Whether the rows of this call are served by several adapters, or some by none."""
    call = current()
    return call is not None and len(set(call.rows or ())) > 1


def without(output: Any, name: str | None) -> Any:
    """An output less its cache: a model gives back the one it was given, also where no cache is asked for."""
    if not isinstance(output, dict) or name not in output:
        return output
    return type(output)(**{key: value for key, value in output.items() if key != name})


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
    if seq2seq and not in_cache(model):
        return encoded(model, made)  # the prompt is the encoder's; the decoder's tokens are the caller's alone
    front = "decoder_" if seq2seq else ""
    first = given_input(made, front)
    if first is None:
        return made
    lead, held = lead_of(model, first.shape[0], first.device), prefix.length(given[name])
    tell(model, made, front, lead, max(held - lead.width, 0))
    _grow_to(made, f"{front}attention_mask", lead, held + first.shape[1])
    _shift(made, f"{front}position_ids", lead)
    _shift(made, "cache_position", lead)
    return made


def encoded(model: Any, made: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call whose encoder has run: its mask covers all that the encoder saw."""
    if (outputs := made.get("encoder_outputs")) is None:
        return made
    batch, length = outputs[0].shape[:2]
    lead = lead_of(model, batch, outputs[0].device)
    if lead.ragged and made.get("attention_mask") is None:
        made["attention_mask"] = outputs[0].new_ones((batch, length - lead.width), dtype=torch.long)
    if _grow_to(made, "attention_mask", lead, length) and lead.ragged:
        made["attention_mask"] = lead.turned(made["attention_mask"])
    return made


def with_embeddings(model: Any, given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the prompt before the input's embeddings.

    Masks and token types grow in front, positions move up, labels of tokens get ignored ones; the labels of a whole
    sequence stay. Of an encoder-decoder the encoder gets the prompt. With prompts of several lengths the rows of a causal
    model end together, those of any other begin together, as what reads its output expects.
    """
    made, seq2seq = dict(given), is_seq2seq(model)
    if made.get("encoder_outputs") is not None:
        return encoded(model, made)
    if not seq2seq and (name := cache_name(model)) is not None:
        prefix.check_room(made.get(name))
    lead = grown_input(model, made, own)
    if not seq2seq:
        _shift(made, "cache_position", lead, start=True)
        _move_labels(made, lead, turn=lead.ragged and not causal(model))
    return made


def grown_input(model: Any, made: dict[str, Any], own: dict[str, Any]) -> Lead:
    """Put the prompts into a call's input, with its mask, its token types and its positions; returns the prompts."""
    ids, embeds = made.pop("input_ids", None), made.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise CallError("give input_ids or inputs_embeds, one of the two, to a model with a prompt.")
    embeds = made["inputs_embeds"] = model.base_model.get_input_embeddings()(ids) if embeds is None else embeds
    lead = lead_of(model, embeds.shape[0], embeds.device)
    tell(model, made, "", lead, 0)
    rows = lead.stacked(lambda p: p.encoder.prompt(lead.rows(p), own_of(lead, p, own))[:, : p.tokens])
    made["inputs_embeds"] = torch.cat([rows.to(embeds), embeds], 1)
    _grow(made, "attention_mask", lead, 1)
    _grow(made, "token_type_ids", lead, 0)
    _shift(made, "position_ids", lead, start=True)
    if lead.ragged and not causal(model):
        for name in ("inputs_embeds", "attention_mask", "token_type_ids", "position_ids"):
            if made.get(name) is not None:
                made[name] = lead.turned(made[name])
    return lead


def _move_labels(made: dict[str, Any], lead: Lead, turn: bool) -> None:
    batch, length = made["inputs_embeds"].shape[0], made["inputs_embeds"].shape[1] - lead.width
    labels = made.get("labels")
    if isinstance(labels, Tensor) and labels.shape[:2] == (batch, length):
        own = lead.stacked(lambda p: p.encoder.labels(labels[: lead.rows(p)], p.tokens), IGNORED)
        made["labels"] = torch.cat([own, labels], 1)
        if turn:
            made["labels"] = lead.turned(made["labels"])
        elif lead.ragged and lead.parts[0].config.task_type != TaskType.TOKEN_CLS:
            made["labels"][lead.counts(labels.device) == 0, lead.width] = IGNORED  # no token comes before it
    for name in ("start_positions", "end_positions"):
        if isinstance(old := made.get(name), Tensor):
            made[name] = old + (lead.counts(old.device) if turn else lead.width)


def with_cache(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the prompts' keys and values in the cache (of the decoder, where there is one)."""
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
    name, lead = cache_name(model), lead_of(model, first.shape[0], first.device)
    assert name is not None  # a model without a cache gets no prefix
    front = "decoder_" if is_seq2seq(model) else ""
    tell(model, made, front, lead, 0)
    made[name] = prefix.filled(model, lead, made.get(name))
    _grow(made, f"{front}attention_mask", lead, 1)
    _shift(made, f"{front}position_ids", lead)
    _shift(made, "cache_position", lead)
    return made


def tell(model: Any, made: dict[str, Any], front: str, lead: Lead, past: int) -> None:
    """Write mask and positions out where a model cannot guess them: before prompts of several lengths.

    past: how many of the caller's tokens the cache holds. Raises `CallError` where the model takes no positions.
    """
    first, places = given_input(made, front), f"{front}position_ids"
    if not lead.ragged:
        return
    turn = not causal(model) and not in_cache(model)
    if first is None or (not turn and places not in model._base_takes):
        raise CallError(
            f"a batch of adapters of several lengths (or of none) needs {places}, which {type(model.base_model).__name__} "
            "does not take, or is called without an input of the same part; mix adapters with as many virtual tokens."
        )
    batch, length = first.shape[:2]
    if made.get(f"{front}attention_mask") is None:
        made[f"{front}attention_mask"] = torch.ones(batch, past + length, dtype=torch.long, device=first.device)
    if not turn and made.get(places) is None:
        made[places] = torch.arange(past, past + length, device=first.device).expand(batch, -1)


def causal(model: Any) -> bool:
    """Whether the part of a model that gets the prompt looks back alone."""
    if is_seq2seq(model):
        return False
    told = [m.is_causal for m in model.base_model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(told) if told else cache_name(model) is not None


def in_cache(model: Any) -> bool:
    """Whether this call's prompts go into the cache."""
    return any(isinstance(encoder, Cache) for encoder in acting(model).values())


def prompt(model: Any, batch: int, task_ids: Tensor | None = None) -> Any:
    """What the active method puts before each row: embeddings `[batch, n, dim]`, or a cache."""
    lead = active_lead(model, batch)
    encoder = lead.parts[0].encoder
    if isinstance(encoder, Cache):
        return prefix.filled(model, lead)
    return encoder.prompt(batch, {} if task_ids is None else {"task_ids": task_ids})


def given_input(made: dict[str, Any], front: str) -> Tensor | None:
    """A call's input: ids or embeddings."""
    return next((v for n in ("input_ids", "inputs_embeds") if isinstance(v := made.get(front + n), Tensor)), None)


def _grow(made: dict[str, Any], name: str, lead: Lead, value: int) -> None:
    old = made.get(name)
    if isinstance(old, Tensor) and old.dim() == 2:
        front = old.new_full((old.shape[0], lead.width), value)
        if lead.ragged:
            front = front.masked_fill(~lead.taken(old.device), 0)
        made[name] = torch.cat([front, old], 1)
    elif old is not None:
        shape = tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__
        raise CallError(f"{name} of a model with a prompt is [batch, tokens]; {shape} was given.")


def _grow_to(made: dict[str, Any], name: str, lead: Lead, length: int) -> bool:
    """Let a mask cover the prompt too, unless it does; returns whether it grew."""
    old = made.get(name)
    grows = isinstance(old, Tensor) and old.dim() == 2 and old.shape[1] + lead.width == length
    if grows:
        _grow(made, name, lead, 1)
    return grows


def _shift(made: dict[str, Any], name: str, lead: Lead, start: bool = False) -> None:
    """Positions moved up by the prompt, whose own come first where it is part of the input."""
    old = made.get(name)
    if isinstance(old, Tensor):
        by = lead.counts(old.device)[:, None] if lead.ragged and old.dim() > 1 else lead.width
        moved = old + by
        own = (torch.arange(lead.width, device=old.device, dtype=old.dtype) - lead.width + by).clamp(min=0)
        made[name] = torch.cat([own.expand(*moved.shape[:-1], -1), moved], -1) if start else moved


def is_seq2seq(model: Any) -> bool:
    return bool(getattr(model.base_model.config, "is_encoder_decoder", False))


def checkpoints(base: Any) -> bool:
    """Whether a transformers model recomputes its activations; 5.x calls that another name than 4.x."""
    found = getattr(base, "is_activation_checkpointing", None)  # each of them looks through the whole model
    return bool(getattr(base, "is_gradient_checkpointing", False) if found is None else found)


Run = Callable[..., Any]
"""A model's forward."""
