# SPDX-License-Identifier: Apache-2.0
"""A run on several processes, as `torchrun` or `accelerate launch` start them: who talks and writes, and what all decide."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from rich.console import Console

from ..errors import GraftletError
from ..weights.whole import is_writer

T = TypeVar("T")


def join(device: torch.device) -> int:
    """Meet the other processes, where there are any, and say how many there are in all."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 1
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu").num_processes


def on_first(work: Callable[[], T]) -> T:
    """What the first process alone does and gives to all; an error of ours that it raises is raised in all."""
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    from accelerate.utils import broadcast_object_list

    told: list[tuple[T | None, GraftletError | None]] = [(None, None)]
    if is_writer():
        try:
            told = [(work(), None)]
        except GraftletError as error:
            told = [(None, error)]
    result, error = broadcast_object_list(told)[0]
    if error is not None:
        raise error
    return cast(T, result)


def any_of(flag: bool) -> bool:
    """Whether it is so in any of the processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    from accelerate import PartialState

    found = torch.tensor(int(flag), device=PartialState().device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def voice(console: Console | None) -> Console:
    """Where progress goes: of several processes, the first one talks."""
    return (console or Console(highlight=False)) if is_writer() else Console(quiet=True)
