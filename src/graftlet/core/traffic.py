# SPDX-License-Identifier: Apache-2.0
"""Calls of a model, and changes of its adapters, on several threads: a change waits until it is alone.

Calls run side by side. What changes layers or weights (add, load, delete, merge, unload, exchange) waits for the calls of
other threads to end, and they wait for it. A thread's own calls and changes may stand inside each other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from ..errors import BusyError

if TYPE_CHECKING:
    from typing import Concatenate

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
    M = TypeVar("M", bound="Changing")
    R = TypeVar("R")


class Traffic:
    """Who is calling a model, and who is changing it. Copies of a model begin without any."""

    def __init__(self) -> None:
        self._free = threading.Condition(threading.Lock())
        self._calls: dict[int, int] = {}
        self._waiting = 0
        self._changes: tuple[int, int] = (0, 0)
        """The thread that is changing the model, and how deep."""

    def __reduce__(self) -> tuple[type[Traffic], tuple[()]]:
        return Traffic, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the model; it waits for a change that another thread makes."""
        me = threading.get_ident()
        with self._free:
            while self._closed(me):
                self._free.wait()
            self._calls[me] = self._calls.get(me, 0) + 1
        try:
            yield
        finally:
            with self._free:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                    self._free.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """A change of the model; it waits for the calls and changes of other threads.

        Raises `BusyError` inside a call of this thread while others are calling: each could wait for the other for ever.
        """
        me = threading.get_ident()
        with self._free:
            while self._taken(me):
                if me in self._calls:
                    raise BusyError(
                        "a model cannot be changed inside a call of it while other threads are calling it or changing it; "
                        "do it after the call."
                    )
                self._waiting += 1
                self._free.wait()
                self._waiting -= 1
            self._changes = (me, self._changes[1] + 1)
        try:
            yield
        finally:
            with self._free:
                self._changes = (me, self._changes[1] - 1)
                self._free.notify_all()

    def _closed(self, me: int) -> bool:
        """Whether a call must wait: for a change of another thread, also one that waits itself, which else might for ever."""
        owner, depth = self._changes
        return me not in self._calls and not (depth and owner == me) and bool(depth or self._waiting)

    def _taken(self, me: int) -> bool:
        owner, depth = self._changes
        return bool(depth and owner != me) or any(other != me for other in self._calls)


class Changing(Protocol):
    """What has adapters that are called and changed."""

    @property
    def traffic(self) -> Traffic: ...


@contextmanager
def calling(model: Changing) -> Iterator[None]:
    """A call of a model; code that is compiled does without, as a lock cannot be traced."""
    if torch.compiler.is_compiling():
        yield
        return
    with model.traffic.call():
        yield


def changes(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A method that changes the model's adapters: it waits until the model is not called."""

    @functools.wraps(method)
    def alone(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.traffic.change():
            return method(self, *args, **kwargs)

    return alone
