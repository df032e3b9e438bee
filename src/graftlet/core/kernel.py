# SPDX-License-Identifier: Apache-2.0
"""Faster equal ways to run an adapter: found by name, asked one after another, each free to decline.

A kernel has the meaning of `Delta.forward`, and no other method knows of it. `GRAFTLET_KERNELS=0` turns all of them off.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .method import Delta, Stage, View

Kernel = Callable[["Delta", "View", Tensor, "Stage"], "Tensor | None"]
"""The adapted layer's output, or None where the kernel does not serve."""

KERNELS: list[str] = ["graftlet.kernels.lowrank:forward"]
"""'module:attribute' of each kernel, imported when the first adapter runs."""

SWITCH = "GRAFTLET_KERNELS"


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels in use: none where the environment says `GRAFTLET_KERNELS=0`. Read once; `kernels.cache_clear()`."""
    if os.environ.get(SWITCH, "1") == "0":
        return ()
    places = (place.partition(":") for place in KERNELS)
    return tuple(getattr(importlib.import_module(home), name) for home, _, name in places)


def fast(method: Delta, p: View, x: Tensor, before: Stage) -> Tensor | None:
    """What the first kernel that serves gives; None where none does, and for a compiler, which makes its own."""
    if torch.compiler.is_compiling():
        return None
    for kernel in kernels():
        y = kernel(method, p, x, before)
        if y is not None:
            return y
    return None


_stands_for: list[str] = []


@contextmanager
def rehearsal(kind: str) -> Iterator[None]:
    """While this lasts, tensors without data stand for tensors on this kind of device, and kernels run as they would there."""
    _stands_for.append(kind)
    try:
        yield
    finally:
        _stands_for.pop()


def kind_of(x: Tensor) -> str:
    """The kind of device that a tensor is on; for one without data, the kind that it stands for in a rehearsal."""
    return _stands_for[-1] if x.is_meta and _stands_for else x.device.type


def autocasts(x: Tensor) -> bool:
    """Whether autocast sees to the dtypes of operations on a tensor."""
    kind = kind_of(x)
    return kind != "meta" and torch.is_autocast_enabled(kind)
