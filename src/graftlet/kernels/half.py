# SPDX-License-Identifier: Apache-2.0
"""Products in the input's half precision, where the device is many times faster at them than in single.

The plain way brings the input up to the adapter's single precision. Here matrices come down to the input instead:

- what an adapter adds is found under autocast, as users train anyway; its parameters and their gradients stay in single
  precision, and sums inside products are in single precision by the hardware;
- a whole weight W' in single precision would lose small changes by being rounded, so it is two halves, the rounded weight
  and what that leaves out:   x W'^T = x H^T + x L^T,   H = half(W'),   L = half(W' - H)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..core.kernel import HALVES, autocasts, kind_of, transformed
from ..core.method import Adding, InputMap, Stage, View
from ..weights.site import Site
from .lowrank import scaled


def serves(x: Tensor) -> bool:
    """Whether half precision is worth it for an input, and nobody else sees to how operations are done."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype not in HALVES or kind_of(x) != "cuda":
        return False
    return not transformed() and not autocasts(x)


def forward(method: Adding, p: View, x: Tensor, before: Stage) -> Tensor | None:
    """The kernel: for whatever an adapter in single precision adds."""
    if not p.casts or p.dtype == x.dtype or not serves(x):
        return None
    y = before(x)
    with lowered(x):
        return y + method.added(p, x).to(y.dtype)


def lowered(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which products are in an input's dtype."""
    return Lowered(x.dtype) if x.is_meta else torch.autocast(x.device.type, x.dtype, cache_enabled=False)


def product(site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor | None:
    """A linear layer's operation with another weight in single precision; None where the plain way is as good."""
    if not site.linear or W.dtype != torch.float32 or not serves(x):
        return None
    y: Tensor = TwoHalves.apply(x, W)  # pyright: ignore[reportAssignmentType]
    return y if b is None else y + b.to(y.dtype)


def mapped(method: InputMap, p: View, v: Tensor) -> Tensor | None:
    """A layer's input as an adapter maps it."""
    if not method.halves or not p.casts or p.dtype == v.dtype or not serves(v):
        return None
    return method.map(p, v)


PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "conv1d", "conv2d", "conv3d"}


class Lowered(TorchFunctionMode):
    """What autocast does to products, for tensors without data, which it passes over."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            args = tuple(self._cast(a) for a in args)
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._cast, value))
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class TwoHalves(torch.autograd.Function):
    """x W^T for W in single precision, by two products in the input's dtype; the input's gradient, which is rounded as much
    itself, by the rounded weight alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        high = W.to(x.dtype)
        low = (W - high).to(x.dtype)
        ctx.save_for_backward(x, high)
        rows = x.reshape(-1, x.shape[-1])
        return torch.mm(rows, low.t()).addmm_(rows, high.t()).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, high = ctx.saved_tensors
        dy = grads[0].reshape(-1, high.shape[0])
        dx = torch.mm(dy, high).view(x.shape) if ctx.needs_input_grad[0] else None
        dW = scaled(dy.t(), x.reshape(-1, x.shape[-1]), 1.0, torch.float32) if ctx.needs_input_grad[1] else None
        return dx, dW
