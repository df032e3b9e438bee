# SPDX-License-Identifier: Apache-2.0
"""The base model's own operations in plain torch, for a CPU: few passes over the data, little kept, no backward left to chance.

Called as liger-kernel's are. A tensor that was kept is never written over, so a graph may be gone through twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Norm(torch.autograd.Function):
    """`x / rms(x) (offset + W)` of `x [..., n]`, rounded before the weight (`llama`) or after it (`gemma`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        full = wide(x)
        root = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, W, root)
        ctx.offset, ctx.casting = offset, casting
        turned = full * root
        if casting == "llama":
            turned = turned.to(x.dtype)
            gain = _gain(W, offset)
            return turned.mul_(gain) if gain.dtype == x.dtype else turned * gain
        return turned.mul_(_gain(wide(W), offset)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, root = ctx.saved_tensors
        full, dy = wide(x), wide(grads[0])
        dx = dW = None
        if ctx.needs_input_grad[0]:
            dx = dy * _gain(wide(W), ctx.offset)
            share = (dx * full).sum(-1, keepdim=True).mul_(root.pow(3)).div_(x.shape[-1])
            dx = dx.mul_(root).addcmul_(full, share, value=-1.0).to(x.dtype)
        if ctx.needs_input_grad[1]:
            turned = full * root
            turned = turned.to(x.dtype) if ctx.casting == "llama" else turned
            dW = (turned * dy).flatten(0, -2).sum(0).to(W.dtype)
        return dx, dW, None, None, None, None


def _gain(W: Tensor, offset: float) -> Tensor:
    return W + offset if offset else W


class SiLUMul(torch.autograd.Function):
    """`silu(a) b`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _times(F.silu(a), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (a, b), dy = ctx.saved_tensors, grads[0]
        if wide(a) is not a:  # each step would be rounded
            return torch.ops.aten.silu_backward(dy * b, a), F.silu(a).mul_(dy)
        s = torch.sigmoid(a)
        slope = a * s
        db = slope * dy
        # silu' = s + a s (1 - s)
        return slope.lerp_(slope.new_ones(()), s).mul_(dy).mul_(b), db


class GELUMul(torch.autograd.Function):
    """`gelu(a) b`, by the hyperbolic tangent."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _times(F.gelu(a, approximate="tanh"), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (a, b), dy = ctx.saved_tensors, grads[0]
        da = torch.ops.aten.gelu_backward(dy * b, a, approximate="tanh")
        return da, F.gelu(a, approximate="tanh").mul_(dy)


def _times(own: Tensor, b: Tensor) -> Tensor:
    """A product, written over a first factor of ours."""
    return own.mul_(b) if own.dtype == b.dtype else own * b


class _Rotary(torch.autograd.Function):
    """`x [rows, heads, tokens, size]` turned by `cos, sin [rows, 1, tokens, size]`: its last axis's halves are the pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        first, second = sin.chunk(2, -1)
        return _turned(x, cos, -first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(grads[0], cos, second, -first).to(ctx.dtype), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`x cos`, and to each half the other one's product with a factor."""
    y = x * cos
    (low, high), (left, right) = y.chunk(2, -1), x.chunk(2, -1)
    low.addcmul_(right, first)
    high.addcmul_(left, second)
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> tuple[Any, Any]:
    """Queries and keys `[rows, heads, tokens, size]` turned by their positions."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


class Dropout(torch.autograd.Function):
    """Entries are zero with the probability `rate`, the others as much larger. A draw is how far it is to the next zero, so
    that there are as many draws as zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        zeros = _zeros(x.numel(), rate, x.device)
        ctx.save_for_backward(zeros)
        ctx.rate = rate
        return _without(x, zeros, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (zeros,) = ctx.saved_tensors
        return _without(grads[0], zeros, ctx.rate), None


def _zeros(count: int, rate: float, device: torch.device) -> Tensor:
    """Places, in their order: each of `count` with the probability `rate`, whatever the others are."""
    if device.type == "meta":
        return torch.empty(int(count * rate), dtype=torch.long, device=device)
    parts, last = [torch.empty(0, dtype=torch.long, device=device)], -1
    while last < count - 1:
        likely = (count - last) * rate
        steps = torch.empty(int(likely + 6 * likely**0.5) + 16, dtype=torch.long, device=device).geometric_(rate)
        parts.append(steps.cumsum_(0).add_(last))
        last = int(parts[-1][-1])
    places = torch.cat(parts)
    return places[: int(torch.searchsorted(places, count))]


def _without(x: Tensor, zeros: Tensor, rate: float) -> Tensor:
    y = x.new_empty(x.shape)  # in one piece, whatever x is
    torch.mul(x, 1 / (1 - rate), out=y)
    y.view(-1).index_fill_(0, zeros, 0)
    return y
