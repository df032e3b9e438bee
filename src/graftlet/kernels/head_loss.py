# SPDX-License-Identifier: Apache-2.0
"""The causal loss of hidden states and a frozen head, without ever having all logits.

On CUDA some rows' logits are made at a time; one pass of a kernel turns them into the loss and, in their place, its gradient,
which goes back through the head at once, and the host never waits for the device. Elsewhere it is a part of the vocabulary
at a time (`head_loss_blocks.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.kernel import autocasts, kind_of, on_device_of, without_autocast
from ..core.prompt import IGNORED
from .head_loss_blocks import loss_and_gradient

ROWS = 1024
"""Logits are made for so many rows at once: enough that the head's weight is not what is waited for."""


class HeadLoss(torch.autograd.Function):
    """The sum of the losses of `hidden [n, features]` against `targets [n]`; `W [vocabulary, features]` does not learn.

    cap: logits z count as `cap tanh(z / cap)`; 0 for as they are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, cap: float) -> Tensor:
        learns = ctx.needs_input_grad[0]
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocasts(hidden) else hidden.dtype
        if kind_of(hidden) == "cuda":
            with without_autocast(hidden.device):  # it passes over products that are written where they belong
                b = None if b is None else b.to(dtype)
                losses, back = _by_rows(hidden.to(dtype), W.to(dtype), b, targets, cap, learns)
        else:
            losses, back = loss_and_gradient(hidden.to(dtype), W, b, targets, cap, learns)
        ctx.save_for_backward(None if back is None else back.to(hidden.dtype))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back,), (grad,) = ctx.saved_tensors, grads
        return (None if back is None else back * grad.to(back.dtype)), None, None, None, None


def _by_rows(
    hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, cap: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    back = torch.empty_like(hidden) if learns else None
    for at in range(0, len(hidden), ROWS):
        rows = slice(at, at + ROWS)
        logits = hidden[rows] @ W.t() if b is None else torch.addmm(b, hidden[rows], W.t())
        _turn(logits, targets[rows], losses[rows], cap)
        if back is not None:
            torch.mm(logits, W, out=back[rows])
        del logits  # before the next ones are made: they are the largest tensor there is
    return losses, back


def _turn(logits: Tensor, targets: Tensor, losses: Tensor, cap: float) -> None:
    """Write the rows' losses, and over the logits `[n, vocabulary]` the gradient of each row's loss."""
    if logits.is_meta:
        return  # in their place, and nothing beside them
    from . import head_loss_triton

    kernel: Any = head_loss_triton.loss_and_gradient
    n, width = logits.shape
    with on_device_of(logits):
        kernel[(n,)](logits, logits.stride(0), targets, losses, width, cap, IGNORED, cap > 0, 8192, num_warps=16)
