# SPDX-License-Identifier: Apache-2.0
"""A model with adapters in its layers and no wrapper around it: its own calls carry what adapters go by.

They also count as calls for who changes its adapters on another thread (`core/traffic.py`).
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.context import Call, current, using
from ..core.traffic import calling
from ..core.tuner import BaseTuner
from . import reach
from .parts import as_rows, carry_context

TUNER = "_tuner"
"""Where a model keeps what knows its adapters, out of the sight of its tree of modules."""


class _Open(threading.local):
    """A thread's calls in progress, the innermost last: what ends with each, and what was found in its tokens."""

    def __init__(self) -> None:
        self.calls: list[tuple[ExitStack, reach.First]] = []


_open = _Open()


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


def _enter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    tuner: BaseTuner = model.__dict__[TUNER]
    ends, first = ExitStack(), reach.First()
    _open.calls.append((ends, first))
    ends.enter_context(calling(tuner))
    given = {name: as_rows(kwargs[name]) for name in tuner.carried if kwargs.get(name) is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in tuner.carried}
    if given:
        call = current() or Call()
        ends.enter_context(using(replace(call, values={**call.values, **given})))
    context, found = reach.within(tuner, args, kwargs)
    if context is not None:
        ends.enter_context(using(context))
        first.update(found)
    if model.training and (given or found):
        carry_context(model)
    return args, kwargs


def _leave(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    ends, first = _open.calls.pop()
    ends.close()
    if first:
        reach.leave(first, output)
