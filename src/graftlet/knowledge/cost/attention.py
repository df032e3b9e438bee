# SPDX-License-Identifier: Apache-2.0
"""Attention without data: what fused kernels keep and take on each kind of device.

torch chooses such a kernel by the device, which tensors without data do not have. So the choice is made here, and the
kernel's place is taken by a step of autograd that makes the very tensors that it would.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...kernels.fused_shapes import Norm
from .ledger import Ledger

ROUND = 128
"""The kernels' own tables are rounded up to so many rows."""


class Fused(torch.autograd.Function):
    """Queries `[rows, heads, tokens, size]`, keys and values with as many heads or fewer, and maybe a mask."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, share: float, cuda: bool, book: Ledger
    ) -> Tensor:
        rows, heads, tokens, _ = q.shape
        y = q.new_empty(rows, tokens, heads, v.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        sums = q.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, sums, mask)
        ctx.facts = share, cuda, book
        _count(book, q, k, v, share, 2)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_ = ctx.saved_tensors
        share, cuda, book = ctx.facts
        _count(book, q, k, v, share, 5)
        rows, heads, tokens, size = q.shape
        long = -(-tokens // ROUND) * ROUND
        scratch = [q.new_empty(rows, heads, long, dtype=torch.float32)]
        if cuda:  # sums of dq in single precision, and of dk and dv for each query's head
            scratch.append(q.new_empty(rows, heads, long, size, dtype=torch.float32))
        dq, dk, dv = (_like(t) for t in (q, k, v))
        if k.shape[1] != heads:
            scratch += [t.new_empty(rows, t.shape[2], heads, t.shape[3]) for t in (k, v)]
        del scratch
        return dq, dk, dv, None, None, None, None


def _like(t: Tensor) -> Tensor:
    """A gradient as the kernels lay it out."""
    return t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)


def _count(book: Ledger, q: Tensor, k: Tensor, v: Tensor, share: float, products: int) -> None:
    rows, heads, tokens, size = q.shape
    flops = int(products * 2 * share * rows * heads * tokens * k.shape[2] * size)
    moved = products * sum(t.numel() * t.element_size() for t in (q, k, v, q)) // 2
    book.counted("attention", flops, moved, q.dtype)


class Operations(TorchFunctionMode):
    """Puts the kernels of a kind of device in the place of those functions that choose one by the device."""

    def __init__(self, kind: str, book: Ledger) -> None:
        super().__init__()
        self.kind, self.book = kind, book

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.kind == "cuda" and _drops(*args, **kwargs):
            x, p = args[0], args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return torch.native_dropout(x, p, True)[0]
        if func is F.rms_norm and self.kind == "cuda" and args[0].is_meta:
            return _norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        mask = attn_mask
        if not q.is_meta or not self._fused(q, k, v, mask, dropout_p, is_causal, enable_gqa):
            return _plain(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=q.dtype, device=q.device)
        half = 0.5 if is_causal else 1.0
        return Fused.apply(q, k, v, mask, half, self.kind == "cuda", self.book)  # pyright: ignore[reportReturnType]

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float, causal: bool, grouped: bool
    ) -> bool:
        if self.kind != "cpu":
            return self.kind == "cuda" and q.shape[-1] <= 256
        probes = [_probe(t) for t in (q, k, v)]
        wanted = None if mask is None else _probe(mask)
        choose: Any = torch.ops.aten._fused_sdp_choice
        chosen = choose(*probes, wanted, rate, causal, scale=None, enable_gqa=grouped)
        return chosen == 1


def _probe(t: Tensor) -> Tensor:
    """A tensor of that shape with one row of data behind it, on the CPU."""
    data = torch.empty(t.shape[-1], dtype=t.dtype, device="cpu")
    return data.as_strided(t.shape, [*[0] * (t.dim() - 1), 1]).requires_grad_(t.requires_grad and t.is_floating_point())


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """Attention from its parts, as torch does it where no kernel serves."""
    if grouped:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    root = math.sqrt(scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    scores = (q * root) @ (k * root).transpose(-2, -1)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + (
            torch.empty(mask.shape, dtype=q.dtype, device=q.device) if mask.dtype == torch.bool else mask
        )
    weights = scores.softmax(-1)
    return (torch.dropout(weights, rate, True) if rate else weights) @ v


def _norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    """torch's own norm is one kernel on CUDA."""
    weight = x.new_empty(list(shape)) if weight is None else weight
    return Norm.apply(x, weight, eps or 0.0, 0.0, "llama", False)


def _drops(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and not inplace and p > 0 and x.is_meta
