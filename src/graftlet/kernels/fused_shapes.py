# SPDX-License-Identifier: Apache-2.0
"""The fused operations of a base model, on tensors without data: what they make, keep, and write over.

On small numbers they compute what liger-kernel's do, so that they can be tried beside a model's own; on tensors without
data they only take the room.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PROCESSORS = 132
"""How many partial sums of a norm's weight gradient there are: one a processor."""


class Norm(torch.autograd.Function):
    """`x / rms(x) (offset + W)`, rounded before the weight (`llama`) or after it (`gemma`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        root = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, W, root)
        if x.is_meta:
            return x.clone()
        turned = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        if casting == "llama":
            return turned.to(x.dtype) * (offset + W)
        return (turned * (offset + W.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, _ = ctx.saved_tensors
        dx, parts = grads[0] + x, W.new_empty(PROCESSORS, len(W), dtype=torch.float32)
        return dx, parts.sum(0).to(W.dtype) if ctx.needs_input_grad[1] else None, None, None, None, None


class _Gated(torch.autograd.Function):
    """`act(a) b`; backward, both gradients are written over what was kept."""

    @staticmethod
    def act(a: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def product(cls, a: Tensor, b: Tensor) -> Tensor:
        return a * b if a.is_meta else cls.act(a) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        return a.detach().mul_(grads[0]), b.detach().mul_(grads[0])


class SiLUMul(_Gated):
    """`silu(a) b`."""

    @staticmethod
    def act(a: Tensor) -> Tensor:
        return F.silu(a)

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return SiLUMul.product(a, b)


class GELUMul(_Gated):
    """`gelu(a) b`, by the hyperbolic tangent."""

    @staticmethod
    def act(a: Tensor) -> Tensor:
        return F.gelu(a, approximate="tanh")

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return GELUMul.product(a, b)


class _InPlace(torch.autograd.Function):
    """A tensor that is written over, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> tuple[Any, Any]:
    """Queries and keys `[rows, heads, tokens, size]` turned by their positions, in their place."""
    if q.is_meta:
        return _InPlace.apply(q), _InPlace.apply(k)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
