# SPDX-License-Identifier: Apache-2.0
"""Adapters that act on a part of each row: from where on is found once a call, and told to the layers token by token.

Places are counted from the start of the whole sequence, so a step with a key-value cache, a step without one, and a
prefill in pieces agree. What a call found is left on its cache for the calls that go on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.context import Call, current, reaches, using
from ..core.layer import AdaptedLayer
from ..core.lifecycle import disabled
from ..core.prompt import CACHES
from ..core.tuner import BaseTuner
from ..errors import CallError, ReachWarning, warn
from .generation import stand_in
from .parts import carry_context

First = dict[str, Tensor]
"""By adapter: each row's first token that it acts on, `[rows]`."""

NEVER = 2**40
KEPT = "_graftlet_first"
"""Where a cache keeps what was found in its tokens."""


def call(tuner: BaseTuner, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call of the adapted model."""
    readers, rehearsers = _readers(tuner), _serving(tuner.rehearsing)
    if not readers and not rehearsers:
        if tuner.training and tuner.surrounding:
            carry_context(tuner)
        return tuner(*args, **kwargs)
    first = _begun(tuner, readers, args, kwargs)
    if tuner.training:
        carry_context(tuner)
    return _run(tuner, first, args, kwargs, rehearsers)


def generate(tuner: BaseTuner, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The adapted model's `generate`: the prompt says from where on an adapter acts, and it goes on to the end."""
    model: Any = tuner.model
    readers, rehearsers = _readers(tuner), _serving(tuner.rehearsing)
    if not readers and not rehearsers:
        model = stand_in(model, lambda *a, **k: call(tuner, a, k)) if tuner.surrounding else model
        return model.generate(*args, **kwargs)
    first = _find(tuner, readers, args, kwargs, 0)
    if rehearsers:
        kwargs = {**kwargs, "use_cache": False}
    return stand_in(model, lambda *a, **k: _run(model, first, a, k, rehearsers)).generate(*args, **kwargs)


def within(tuner: BaseTuner, args: tuple, kwargs: dict[str, Any]) -> tuple[Call | None, First]:
    """For a call of the model itself: the context that it is to have, None where that is as it is, and what was found."""
    if not (readers := _readers(tuner)):
        return None, {}
    first, context = _begun(tuner, readers, args, kwargs), current() or Call()
    return replace(context, values={**context.values, **_acts(first, args, kwargs)}), first


def leave(first: First, output: Any) -> None:
    """Leave what was found on an output's cache, for the calls that go on with it."""
    cache = _cache({name: getattr(output, name, None) for name in CACHES})
    if cache is not None:
        cache.__dict__[KEPT] = {**_kept(cache), **first}


def _begun(tuner: BaseTuner, readers: list[str], args: tuple, kwargs: dict[str, Any]) -> First:
    """What is found in a call's tokens, or was found in those of its cache."""
    first = _find(tuner, readers, args, kwargs, _before(args, kwargs))
    for name, known in _kept(_cache(kwargs)).items():
        if name in first and len(known) == len(first[name]):
            first[name] = torch.where(first[name] == NEVER, known.to(first[name].device), first[name])
    return first


def _acts(first: First, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """On which of a call's tokens each adapter acts, to be carried in it."""
    (rows, count), before = _size(args, kwargs), _before(args, kwargs)
    found = {}
    for name, start in first.items():
        places = torch.arange(before, before + count, device=start.device)
        found[reaches(name)] = places >= start.repeat_interleave(rows // len(start))[:, None]
    return found


def _readers(tuner: BaseTuner) -> list[str]:
    """The adapters that serve the call in progress and go by its tokens."""
    return [name for name, _ in _serving(tuner.reading)]


def _serving(layers: dict[str, AdaptedLayer]) -> list[tuple[str, AdaptedLayer]]:
    """Of these adapters, each with one of its layers, those that serve the call in progress."""
    if not layers:
        return []
    context = current()
    rows = None if context is None else context.rows
    return [
        (name, layer) for name, layer in layers.items() if name in (layer.acting(context) if rows is None else rows)
    ]


def _find(tuner: BaseTuner, readers: list[str], args: tuple, kwargs: dict[str, Any], before: int) -> First:
    ids, (rows, count) = _ids(args, kwargs), _size(args, kwargs)
    context = current()
    given = {} if context is None else context.values
    found: First = {}
    for name in readers:
        layer = tuner.reading[name]
        reach = layer.methods[name].reach(layer.configs[name], ids, given)
        if reach is None:
            warn(
                ReachWarning, f"adapter {name!r} goes by input_ids; a call without them runs as the base.", stacklevel=6
            )
            reach = torch.zeros(rows, dtype=torch.int64)
        if len(reach) != rows:
            raise CallError(f"{len(reach)} rows are said where adapter {name!r} begins, but the call has {rows}.")
        found[name] = torch.where(reach > 0, before + count - reach, NEVER)
    return found


Rehearsers = list[tuple[str, AdaptedLayer]]


def _run(model: Any, first: First, args: tuple, kwargs: dict[str, Any], rehearsers: Rehearsers) -> Any:
    """One forward, whose tokens an adapter acts on from its first one on; after what is to be found out about it."""
    (rows, count), before = _size(args, kwargs), _before(args, kwargs)
    context = current() or Call()
    values = {**context.values, **_acts(first, args, kwargs)}
    for name, layer in rehearsers:
        if before:
            raise CallError(f"adapter {name!r} looks at all tokens of a call, and cannot go on from a cache.")
        kwargs = {**kwargs, "use_cache": False}
        values.update(layer.methods[name].rehearse(layer.view(name), _rehearsal(model, args, kwargs), (rows, count)))
    with using(replace(context, values=values)):
        output = model(*args, **kwargs)
    leave(first, output)
    return output


def _rehearsal(model: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[Mapping[str, Tensor] | None], Tensor]:
    """The same call once more, for its last hidden state: see `Method.rehearse`."""
    given = {name: value for name, value in kwargs.items() if name != "labels"}
    given.update(output_hidden_states=True, return_dict=True)

    def run(values: Mapping[str, Tensor] | None) -> Tensor:
        off = disabled(model) if values is None else nullcontext()
        plain = replace(current() or Call(), rows=None, alone=None, values=values or {})
        with torch.no_grad(), using(plain), off:
            return model(*args, **given).hidden_states[-1]

    return run


def _ids(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """A call's token ids `[rows, tokens]`."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    ids = next((t for t in given if isinstance(t, Tensor) and not t.is_floating_point()), None)
    return ids[None] if ids is not None and ids.dim() == 1 else ids


def _size(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """How many rows and tokens a call has."""
    ids, embeds = _ids(args, kwargs), kwargs.get("inputs_embeds")
    given = [ids, embeds, *args] if ids is not None and ids.shape[1] else [embeds, *args]
    first = next((t for t in given if isinstance(t, Tensor) and t.dim() > 1), None)
    if first is None:
        raise CallError("the call has neither input_ids nor inputs_embeds, by which its adapter goes.")
    return first.shape[0], first.shape[1]


def _before(args: tuple, kwargs: dict[str, Any]) -> int:
    """How many tokens came before a call's, by its cache, or by an attention mask that is longer than they."""
    cache, mask = _cache(kwargs), kwargs.get("attention_mask")
    if cache is not None:
        return int(cache.get_seq_length())
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return max(mask.shape[1] - _size(args, kwargs)[1], 0)
    return 0


def _cache(given: dict[str, Any]) -> Any:
    """The cache among a call's arguments, or outputs; None where there is none."""
    found = (given.get(name) for name in CACHES)
    return next((cache for cache in found if callable(getattr(cache, "get_seq_length", None))), None)


def _kept(cache: Any) -> First:
    """What earlier calls found in a cache's tokens."""
    return {} if cache is None else cache.__dict__.get(KEPT, {})
