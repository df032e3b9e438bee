# SPDX-License-Identifier: Apache-2.0
"""A model with adapters in its layers and no wrapper around it: its own calls carry what adapters go by.

They also count as calls for who changes its adapters on another thread (`core/traffic.py`).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..core.context import Call, current, put
from ..core.tuner import BaseTuner
from ..errors import CallError, listing
from . import reach
from .parts import as_rows, carry_context

TUNER = "_tuner"
"""Where a model keeps what knows its adapters, out of the sight of its tree of modules."""


@dataclass
class _Open:
    """A call in progress. ends: what ends with it. before: the context around it. first: what was found in its tokens."""

    ends: AbstractContextManager[None]
    before: Call | None
    first: reach.First


class _Calls(threading.local):
    """A thread's calls in progress, the innermost last."""

    def __init__(self) -> None:
        self.open: list[_Open] = []


_calls = _Calls()


def tuner_in(model: nn.Module) -> BaseTuner:
    """What knows the adapters that were put into a model, or are about to be."""
    held: BaseTuner | None = model.__dict__.get(TUNER)
    if held is None:
        held = BaseTuner(model, {})
        held.shared_in = [model]
    return held


def attend(tuner: BaseTuner) -> None:
    """From now on, attend to the calls of the model that a tuner has put adapters into."""
    model = tuner.model
    if TUNER not in model.__dict__:
        model.__dict__[TUNER] = tuner
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def _enter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    tuner: BaseTuner = model.__dict__[TUNER]
    if _idle(tuner):
        return None
    _leave_to_python(tuner)
    call = _Open(tuner.traffic.call(), current(), {})
    call.ends.__enter__()
    _calls.open.append(call)
    given = {name: as_rows(kwargs[name]) for name in tuner.carried if kwargs.get(name) is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in tuner.carried}
    if given:
        outer = current() or Call()
        put(replace(outer, values={**outer.values, **given}))
    context, found = reach.within(tuner, args, kwargs)
    if context is not None:
        put(context)
        call.first.update(found)
    if model.training and (given or found):
        carry_context(model)
    return args, kwargs


def _leave(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    tuner: BaseTuner = model.__dict__[TUNER]
    if _idle(tuner):
        return
    _leave_to_python(tuner)
    call = _calls.open.pop()
    put(call.before)
    call.ends.__exit__(None, None, None)
    if call.first:
        reach.leave(call.first, output)


def _idle(tuner: BaseTuner) -> bool:
    """Whether a call needs nothing: code that is compiled has no locks, and no adapter here goes by a call."""
    return torch.compiler.is_compiling() and not tuner.carried and not tuner.reading


def _leave_to_python(tuner: BaseTuner) -> None:
    """Make a compiler that may leave code out do so with what calls this; one that may not says why it cannot."""
    if torch.compiler.is_compiling():
        raise CallError(f"{listing(tuner.reading)}: a call says where these begin, which cannot be compiled here.")
