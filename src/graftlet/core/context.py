# SPDX-License-Identifier: Apache-2.0
"""What one call of a model carries to its layers: which adapter serves each row.

It belongs to the call and its thread. Layers read it as they run, so no hooks are added or removed. A recomputation by
gradient checkpointing happens after the call has returned; `carrying` brings the context along.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import CallError
from .ahead import Answer, Answers, Questions
from .copies import Asked, Copies
from .kernel import capturing
from .traffic import Traffic

R = TypeVar("R")

BASE = "__base__"
"""In `adapter_names`: a row that the base model serves alone."""


class Home:
    """What the adapted layers of one model have in common, and no other model's."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.asked: Asked | None = None
        self.foreseen = Questions()


@dataclass(frozen=True)
class Call:
    """One call's facts.

    rows: an adapter name for each row of the batch, or None where the model's own choice acts. alone: while one
        adapter's rows are served, its name, for layers that are read by another layer rather than called. chosen: the
        adapters that act in a model, whichever are active there; none where it is an empty tuple.
    """

    rows: tuple[str, ...] | None = None
    alone: str | None = None
    chosen: tuple[tuple[Home, tuple[str, ...]], ...] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """What the call carries for methods that ask for it (`Method.carries`), by name: an entry a row of the batch."""
    trail: dict[tuple[str, int], Tensor] = field(default_factory=dict, compare=False)
    """What the blocks of an adapter hand on to each other, by its name and the number of the block that takes it."""
    copies: Copies | None = field(default=None, compare=False)
    """Copies of what learns in the dtype that the model computes in, where there are some."""
    answers: Answers | None = field(default=None, compare=False)
    """What is answered for all layers at once, where something is."""
    known: dict[Any, Any] = field(default_factory=dict, compare=False)
    """Groups found so far: the layers of a model ask for the same ones."""

    def choice(self, home: Home) -> tuple[str, ...] | None:
        """The adapters that act in a model; None where those that are active there do."""
        for one, names in self.chosen:
            if one is home:
                return names
        return None

    def groups(self, count: int | None, device: torch.device, exact: bool = False) -> list[tuple[str, Tensor]] | None:
        """Each adapter with the indices of its rows in an input of `count` rows; None where they cannot be told.

        Beam search repeats every row, so `count` may be a multiple, unless the rows must match exactly.
        """
        rows = self.rows or ()
        if count is None or not rows or count % len(rows) or (exact and count != len(rows)):
            return None
        if (count, device) not in self.known:
            self.known[count, device] = _served(rows, count, device)
        return self.known[count, device]

    def served(self, held: Mapping[str, Any]) -> tuple[str, ...]:
        """The adapters that serve rows, of those that are held, in the order of their first rows."""
        if "served" not in self.known:
            self.known["served"] = tuple(name for name in dict.fromkeys(self.rows or ()) if name != BASE)
        every: tuple[str, ...] = self.known["served"]
        return every if all(map(held.__contains__, every)) else tuple(filter(held.__contains__, every))

    def which(self, names: tuple[str, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of an input of `count` rows, those that one of these adapters serves, and the number of the adapter in `names`."""
        if (names, count, device) not in self.known:
            self.known[names, count, device] = _owners(self.rows or (), names, count, device)
        return self.known[names, count, device]

    def value(self, name: str, count: int) -> Tensor | None:
        """What is carried under a name, for an input of `count` rows; None where nothing fits."""
        carried = self.values.get(name)
        if carried is None or not len(carried) or count % len(carried):
            return None
        return carried if count == len(carried) else carried.repeat_interleave(count // len(carried), 0)

    def tokens(self, name: str, lead: torch.Size) -> Tensor | None:
        """What is carried under a name, `[rows, tokens, ...]`, for an input of the shape `[*lead, features]`.

        Rows may be repeated, as beam search does, and all in one; a layer may be given the last tokens only, as an output
        head is. None where nothing is carried; raises `CallError` where the input's tokens are not the call's.
        """
        carried = self.values.get(name)
        if carried is None:
            return None
        rows, count = carried.shape[:2]
        if len(lead) == 2 and lead[0] % rows == 0 and lead[1] <= count:
            return carried[:, count - lead[1] :].repeat_interleave(lead[0] // rows, 0)
        if len(lead) == 1 and lead[0] == rows * count:
            return carried.flatten(0, 1)
        raise CallError(
            f"a layer was called with an input of {tuple(lead)} tokens, which are not the call's {(rows, count)}; an "
            "adapter that goes by tokens cannot be on it: leave the layer out of target_modules."
        )

    def part(self, name: str, index: Tensor, count: int) -> Call:
        """The context of some of `count` rows, which one adapter serves."""
        values = {
            n: v.index_select(0, index.to(v.device)) for n in self.values if (v := self.value(n, count)) is not None
        }
        return Call(alone=name, values=values)


def kept(make: Callable[..., R]) -> Callable[..., R]:
    """Index tensors by what they are made from, kept from call to call: servers ask for the same ones again and again.

    So they are on the device before a call is captured in a graph, which can copy nothing there; what one reads stays for good.
    Compiled code makes its own, and so does what runs in another mode, where a tensor may stand for one.
    """
    read: dict[Any, R] = {}

    @functools.lru_cache(maxsize=64)
    def remembered(*key: Any) -> R:
        with torch.inference_mode(False):  # they may stand in a graph of autograd later
            return make(*key)

    @functools.wraps(make)
    def found(*key: Any) -> R:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return make(*key)
        return read.setdefault(key, remembered(*key)) if capturing(key[-1]) else remembered(*key)

    return found


@kept
def _served(rows: tuple[str, ...], count: int, device: torch.device) -> list[tuple[str, Tensor]]:
    """Each adapter with the indices of its rows."""
    repeat, found = count // len(rows), dict[str, list[int]]()
    for i, name in enumerate(rows):
        found.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
    return [(name, torch.tensor(index, device=device)) for name, index in found.items()]


@kept
def _owners(rows: tuple[str, ...], names: tuple[str, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of `count` rows, those that one of these adapters serves, and the number of that adapter in `names`."""
    number, repeat = {name: i for i, name in enumerate(names)}, count // len(rows)
    served = [(i, number[rows[i // repeat]]) for i in range(count) if rows[i // repeat] in number]
    index, owner = zip(*served, strict=True)
    return torch.tensor(index, device=device), torch.tensor(owner, device=device)


def reaches(adapter: str) -> str:
    """The name under which a call carries on which of its tokens an adapter acts, `[rows, tokens]`."""
    return f"reach of {adapter}"


class _Local(threading.local):
    call: Call | None = None


_local = _Local()


def current() -> Call | None:
    """The context of the call in progress on this thread."""
    return _local.call


def put(call: Call | None) -> None:
    """Make `call` the context from now on."""
    _local.call = call


@contextmanager
def using(call: Call | None) -> Iterator[None]:
    """Make `call` the context until the block ends."""
    before, _local.call = _local.call, call
    try:
        yield
    finally:
        _local.call = before


@contextmanager
def copying(home: Home) -> Iterator[None]:
    """Let the layers of a model have what they need of what learns, all made in one step, until the block ends."""
    copies, answers = Copies(home.asked or Asked()), Answers(home.foreseen)
    with using(replace(current() or Call(), copies=copies, answers=answers)):
        yield
    home.asked, home.foreseen = copies.asked, answers.asked


def copies() -> Copies | None:
    """The copies of the call in progress on this thread, where it has some."""
    call = current()
    return None if call is None else call.copies


def foreseen(answer: Answer, tensors: tuple[Tensor, ...], number: float) -> Tensor | None:
    """What a layer asks, answered for all layers at once; None where it was not foreseen in the call in progress."""
    call = current()
    return None if call is None or call.answers is None else call.answers.of(answer, tensors, number)


@contextmanager
def choosing(home: Home, names: tuple[str, ...]) -> Iterator[None]:
    """Let these adapters act in a model until the block ends: on this thread alone, whichever are active."""
    call = current() or Call()
    others = tuple(pair for pair in call.chosen if pair[0] is not home)
    with using(replace(call, chosen=(*others, (home, names)), known={})):
        yield


class Carrying:
    """A checkpoint function whose recomputation sees the context that its forward saw."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current()

        def again(*a: Any, **k: Any) -> Any:
            with using(call):
                return function(*a, **k)

        return self.checkpoint(again if call is not None else function, *args, **kwargs)
