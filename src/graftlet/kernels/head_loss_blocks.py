# SPDX-License-Identifier: Apache-2.0
"""The causal loss of hidden states and a frozen head on a CPU: a block of the vocabulary at a time, for all rows at once.

With p = softmax(W h), the gradient of a row's loss is  sum_j p_j W_j - W_target.  It is an attention of the hidden states to
the head's rows, so its sums are rescaled whenever a larger logit comes, and a block of logits is gone once it is in them.
The target's own term is left out of the sums and comes last: the loss as  log(1 + others / own),  its gradient as
(p - 1) W_target  with p - 1 by `expm1`. So what is nearly certain keeps its digits, in half precision too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.prompt import IGNORED
from .plain_ops import wide

BLOCK = 1 << 20
"""Logits that are there at once: they stay in a CPU's cache between the two products."""
LEAST = 256
"""Columns of a block, if the rows are many."""


@dataclass
class Sums:
    """Of each row `[n, 1]`, over the logits so far: the largest one, and sums over all but the target's, where a logit
    weighs `exp(logit - largest)`.
    """

    largest: Tensor
    weight: Tensor
    back: Tensor | None
    """The weighed sum of the head's rows `[n, features]`; None where no gradient is wanted."""
    target: Tensor
    """The target's logit, once it was there, and how fast it grows, which is 1 without a cap."""
    slope: Tensor


def loss_and_gradient(
    hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, cap: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The rows' losses `[n]`, and where `learns` their gradients `[n, features]`. Rows without a target cost nothing."""
    counted = _where(targets != IGNORED)
    if hidden.is_meta or len(counted) == len(targets):
        return _counted(hidden, W, b, targets, cap, learns)
    losses, back = _counted(hidden[counted], W, b, targets[counted], cap, learns)
    full = losses.new_zeros(len(targets)).index_copy_(0, counted, losses)
    return full, None if back is None else back.new_zeros(hidden.shape).index_copy_(0, counted, back)


def _counted(
    hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, cap: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    n = len(hidden)
    zeros = wide(hidden.new_empty(0)).new_zeros(n, 1)
    back = zeros.new_zeros(hidden.shape) if learns else None
    sums = Sums(torch.full_like(zeros, -torch.inf), zeros.clone(), back, zeros.clone(), zeros + 1)
    size = min(len(W), max(LEAST, BLOCK // max(n, 1)))
    room = hidden.new_empty(n * size)
    for at in range(0, len(W), size) if n else ():
        part = W[at : at + size].to(hidden.dtype)
        logits = room[: n * len(part)].view(n, -1)
        torch.mm(hidden, part.t(), out=logits)
        if b is not None:
            logits.add_(b[at : at + size])
        inside = _where((targets >= at) & (targets < at + size))
        _add(sums, logits, part, (inside, targets[inside] - at), cap)
    losses = F.softplus(sums.weight.log() + sums.largest - sums.target, threshold=40)
    if back is not None:
        back.div_(sums.weight.add_((sums.target - sums.largest).exp_()))
        back.addcmul_(W[targets], torch.expm1(-losses) * sums.slope)
    return losses[:, 0], back


def _where(said: Tensor) -> Tensor:
    """The rows of which something is so; none are known of where there is no data."""
    return said.new_empty(0, dtype=torch.long) if said.is_meta else said.nonzero()[:, 0]


def _add(sums: Sums, logits: Tensor, W: Tensor, own: tuple[Tensor, Tensor], cap: float) -> None:
    """Take a block of logits `[n, columns]`, which is written over, into the sums. own: its rows and columns of targets."""
    z, slope, (rows, _) = wide(logits), None, own
    if cap:
        slope = z.div_(cap).tanh_().square().neg_().add_(1)
        z.mul_(cap)
        sums.slope[rows, 0] = slope[own]
    sums.target[rows, 0] = z[own]
    largest = torch.maximum(sums.largest, z.amax(1, keepdim=True))
    fade = (sums.largest - largest).exp_()
    sums.largest = largest
    z.sub_(largest).exp_()
    z[own] = 0
    sums.weight.mul_(fade).add_(z.sum(1, keepdim=True))
    if sums.back is None:
        return
    if slope is not None:
        z.mul_(slope)
    sums.back.mul_(fade)
    if logits is z:
        sums.back.addmm_(z, W)
    else:
        sums.back.add_(logits.copy_(z) @ W)
