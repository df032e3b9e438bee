# SPDX-License-Identifier: Apache-2.0
"""The causal loss of hidden states and a frozen head, without ever having all logits.

Some rows' logits are made at a time; one pass of a kernel turns them into the loss and, in their place, its gradient, which
goes back through the head at once. The host never waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.kernel import kind_of
from ..core.prompt import IGNORED

ROWS = 1024
"""Logits are made for so many rows at once: enough that the head's weight is not what is waited for."""


class HeadLoss(torch.autograd.Function):
    """The sum of the losses of `hidden [n, features]` against `targets [n]`; `W [vocabulary, features]` does not learn.

    cap: logits z count as `cap tanh(z / cap)`; 0 for as they are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, cap: float) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        back = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(hidden), ROWS):
            rows = slice(at, at + ROWS)
            logits = hidden[rows] @ W.t() if b is None else torch.addmm(b, hidden[rows], W.t())
            turned(logits, targets[rows], losses[rows], cap)
            if back is not None:
                torch.mm(logits, W, out=back[rows])
        ctx.save_for_backward(back)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back,), (grad,) = ctx.saved_tensors, grads
        return (None if back is None else back * grad.to(back.dtype)), None, None, None, None


def turned(logits: Tensor, targets: Tensor, losses: Tensor, cap: float) -> None:
    """Write the rows' losses, and over the logits `[n, vocabulary]` the gradient of each row's loss."""
    if logits.is_meta and kind_of(logits) == "cuda":
        return  # in their place, and nothing beside them
    if logits.is_cuda and (kernel := _kernel()) is not None:
        n, width = logits.shape
        kernel[(n,)](logits, logits.stride(0), targets, losses, width, cap, IGNORED, cap > 0, 8192, num_warps=16)
        return
    z = logits.float()
    squashed = cap * torch.tanh(z / cap) if cap else z
    counts = (targets != IGNORED)[:, None]
    index = targets.clamp_min(0)[:, None]
    norms = squashed.logsumexp(1, keepdim=True)
    losses.copy_(((norms - squashed.gather(1, index)) * counts)[:, 0])
    grad = (squashed - norms).exp_()
    grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
    if cap:
        grad *= 1 - (squashed / cap) ** 2
    logits.copy_(grad * counts)


@functools.cache
def _kernel() -> Any:
    """The compiled pass; None where Triton is not installed."""
    try:
        from . import head_loss_triton
    except ImportError:
        return None
    return head_loss_triton.loss_and_gradient
