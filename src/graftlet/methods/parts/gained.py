# SPDX-License-Identifier: Apache-2.0
"""What DoRA needs, without ever building W + dW: the norms of its rows, and a gain a channel in one pass each way.

|w + s B a|^2 = |w|^2 + 2 s <w, B a> + s^2 |B a|^2, where the last two are products with r columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.ahead import Question
from ...core.context import foreseen
from ...core.kernel import fast_gain, fast_norms, fast_regain, kind_of


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The norms of the rows of `W + scale B A`, `[out]`, in single precision; W's own are found once."""
    found = foreseen(_every_norm, (W, A, B), scale)
    return _every_norm([((W, A, B), scale)])[0] if found is None else found


@torch.no_grad()
def _every_norm(asked: Sequence[Question]) -> Sequence[Tensor]:
    parts = [(W, A, B, _squares(W), scale) for (W, A, B), scale in asked]
    found = fast_norms(parts)
    return [_norms(*part) for part in parts] if found is None else found


def _norms(W: Tensor, A: Tensor, B: Tensor, squares: Tensor, scale: float) -> Tensor:
    A, B = A.float(), B.float()
    across = W @ A.t().to(W.dtype) if kind_of(W) == "cuda" else W.float() @ A.t()
    added = 2 * scale * (across.float() * B).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)
    return (squares + added).clamp_min_(0).sqrt_()


def _squares(W: Tensor) -> Tensor:
    """|w|^2 of each row; kept for a weight that stays as it is."""
    mark = None if W.is_inference() else (W.data_ptr(), W._version, W.device, W.dtype)
    return _kept.get(W, mark, lambda: torch.linalg.vector_norm(W, dim=1, dtype=torch.float32).square_())


class WhileSame:
    """What was found out about a tensor, for as long as a mark, such as its version, is the same."""

    def __init__(self) -> None:
        self._held = WeakTensorKeyDictionary()

    def get(self, about: Tensor, mark: Any, make: Callable[[], Tensor]) -> Tensor:
        """What is kept, or made now; nothing is kept under the mark None."""
        found = None if mark is None else self._held.get(about)
        if found is not None and found[0] == mark:
            return found[1]
        made = make()
        if mark is not None:
            with torch.inference_mode(False):  # made in inference mode, it may be read outside of it
                self._held[about] = (mark, made.detach().clone())
        return made

    def clear(self) -> None:
        """Forget all of it."""
        self._held.clear()


_kept = WhileSame()


def gained(z: Tensor, gain: Tensor, b: Tensor | None, over: Tensor | None = None) -> Tensor:
    """(z - b) gain + b for `z [..., out]`, in z's dtype: computed in single precision, rounded once. over: the gain is what
    this, a constant, divides it to.
    """
    wider = z.dtype != gain.dtype and torch.is_grad_enabled()
    y: Any = Gained.apply(z, gain, over) if wider else _times(z, gain if over is None else gain / over)
    if b is None:
        return y
    return y + (b - b * (gain if over is None else gain / over).to(b.dtype))


def _times(z: Tensor, gain: Tensor) -> Tensor:
    if z.dtype == gain.dtype:
        return z * gain
    y = fast_gain(z, gain)
    return torch.mul(z, gain, out=torch.empty_like(z)) if y is None else y


class Gained(torch.autograd.Function):
    """z gain / over, without copies of z in a wider dtype."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, over: Tensor | None) -> Tensor:
        dtype, gain = gain.dtype, gain if over is None else gain / over
        ctx.save_for_backward(z, gain, over)
        ctx.dtype = dtype
        return _times(z, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (z, gain, over) = grads, ctx.saved_tensors
        wants_z, wants_gain = ctx.needs_input_grad[:2]
        dz = dgain = None
        if wants_z and wants_gain and (found := fast_regain(grad, z, gain)) is not None:
            dz, dgain = found
        else:
            dz = torch.mul(grad, gain, out=torch.empty_like(grad)) if wants_z else None
            dgain = (grad * z).flatten(0, -2).sum(0, dtype=torch.float32) if wants_gain else None
        if dgain is not None:
            dgain = (dgain if over is None else dgain / over).to(ctx.dtype)
        return dz, dgain, None
