# SPDX-License-Identifier: Apache-2.0
"""Faster equal ways to run an adapter: found by name, asked one after another, each free to decline.

A kernel has the meaning of `Adding.forward` or of `Site.op`, and no method knows of it. `GRAFTLET_KERNELS=0` turns all of
them off.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..weights.product import Product
    from ..weights.site import Site
    from .algebra import Thin
    from .method import Adding, InputMap, Stage, View

Kernel = Callable[..., Any]
"""What is asked for, or None where the kernel does not serve."""

KERNELS: dict[str, list[str]] = {
    "adapter": [f"graftlet.kernels.{name}:forward" for name in ("lowrank", "wide", "half", "summed")],
    "thin": ["graftlet.kernels.lowrank:product_of"],
    "product": ["graftlet.kernels.half:product"],
    "map": ["graftlet.kernels.half:mapped"],
    "rows": ["graftlet.kernels.rows:begun"],
    "gain": ["graftlet.kernels.gain:gained"],
    "regain": ["graftlet.kernels.gain:regained"],
    "norms": ["graftlet.kernels.gain:norms"],
    "outer": ["graftlet.kernels.gated:outer"],
}
"""'module:attribute' of each kernel, imported when the first adapter runs: for a layer with what an adapter adds, for a
product with two thin ones added, for a layer with another weight, for what maps a layer's input, for rows with adapters of
their own, for a gain a channel, its gradients, and the norms that it is found from, and for sums over the rows of a product.
"""

SWITCH = "GRAFTLET_KERNELS"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


@functools.cache
def kernels(what: str = "adapter") -> tuple[Kernel, ...]:
    """The kernels in use: none where the environment says `GRAFTLET_KERNELS=0`. Read once; `kernels.cache_clear()`."""
    if os.environ.get(SWITCH, "1") == "0":
        return ()
    places = (place.partition(":") for place in KERNELS[what])
    return tuple(getattr(importlib.import_module(home), name) for home, _, name in places)


@functools.cache
def in_triton(name: str) -> Any:
    """A module of kernels that are written in Triton, where that is installed; else None."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"graftlet.kernels.{name}")


def fast(method: Adding, p: View, x: Tensor, before: Stage) -> Tensor | None:
    """The adapted layer's output by the first kernel that serves; None where none does."""
    return _first("adapter", method, p, x, before)


def fast_thin(x: Tensor, thin: Thin, product: Product, casts: bool) -> Tensor | None:
    """A product with two thin ones added by the first kernel that serves; None where none does."""
    return _first("thin", x, thin, product, casts)


def fast_product(site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor | None:
    """The layer's operation with another weight by the first kernel that serves; None where none does."""
    return _first("product", site, x, W, b)


def fast_map(method: InputMap, p: View, v: Tensor) -> Tensor | None:
    """A layer's input as an adapter maps it by the first kernel that serves; None where none does."""
    return _first("map", method, p, v)


def fast_rows(x: Tensor, A: Tensor, B: Tensor, owner: Tensor) -> Callable[[Tensor, Tensor | None], None] | None:
    """What each row's adapter makes of a layer's input `[n, ..., in]`, begun by the first kernel that serves; None where none
    does. It is to be called with the output `[n, tokens, out]`, which it is written to, and what it is added to.
    """
    return _first("rows", x, A, B, owner)


def fast_gain(z: Tensor, gain: Tensor) -> Tensor | None:
    """`z [..., m]` times a gain `[m]` by the first kernel that serves; None where none does."""
    return _first("gain", z, gain)


def fast_regain(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of both by the first kernel that serves; None where none does."""
    return _first("regain", dy, z, gain)


def fast_norms(asked: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, float]]) -> list[Tensor] | None:
    """The norms of the rows of `W + s B A` for each `(W, A, B, |w|^2 of each row, s)`, by the first kernel that serves all
    of them; None where none does.
    """
    return _first("norms", asked)


def fast_outer(dh: Tensor, words: Tensor | None, a: Tensor, b: Tensor) -> Tensor | None:
    """`dh^T (a b)` for `dh [n, r]` and two tensors of n rows, by the first kernel that serves; None where none does. words:
    by which bits entries of the product are dropped.
    """
    return _first("outer", dh, words, a, b)


def _first(what: str, *given: Any) -> Any:
    if torch.compiler.is_compiling():  # a compiler makes its own
        return None
    for kernel in kernels(what):
        found = kernel(*given)
        if found is not None:
            return found
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


def transformed() -> bool:
    """Whether a transform of functions is at work: `vmap`, `grad` and their like."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def untouched(x: Any) -> bool:
    """Whether an input is a plain tensor with data, and nobody else sees to how operations on it are done: autocast, a
    transform of functions.
    """
    if type(x) is not Tensor or x.is_meta or x.dtype not in DTYPES or autocasts(x):
        return False
    return not transformed()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which operations are in their tensors' own dtypes. Tensors without data know no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def stream_of(device: torch.device) -> int:
    """The number of the stream in use on a device; 0 where there are none."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block whose kernels go to a tensor's device: else they go to the one in use, which need not be that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. It reads at each replay what it read then, and keeps none of it alive."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
