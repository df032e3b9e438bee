# SPDX-License-Identifier: Apache-2.0
"""A change that is as wide a product as the layer's own, in half precision:   y = x W^T + x dW^T + b

The second product is added to the first as it is made, and no pass over the output is left. W + dW, rounded, would lose
small changes, so the output has both products; the input's gradient, which is rounded as much itself, has that sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.method import Adding, Delta, Stage, View
from . import half


def forward(method: Adding, p: View, x: Tensor, before: Stage) -> Tensor | None:
    """The kernel: for a change that is applied as a whole matrix, on a frozen linear layer that nothing else looks at."""
    if not isinstance(method, Delta) or not half.serves(x) or not (p.casts and method.whole(p, x)):
        return None
    if x.dim() < 2 or not p.site.linear or (product := before.product()) is None or not isinstance(product.W, Tensor):
        return None
    if not product.dtype == x.dtype != p.dtype or product.casts or method.drop(p, x) is not x:
        return None
    with half.lowered(x):
        dW, b, db = method.rounded(p, x.dtype), product.b, method.delta_bias(p)
    y: Tensor = WideProduct.apply(x, product.W, b, dW)  # pyright: ignore[reportAssignmentType]
    return y if db is None else y + db.to(y.dtype)


class WideProduct(torch.autograd.Function):
    """The two products, W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, dW: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = torch.mm(rows, W.t()) if b is None else torch.addmm(b, rows, W.t())
        ctx.save_for_backward(x, W, dW)
        return y.addmm_(rows, dW.t()).view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, dW = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        dx = torch.mm(dy, W + dW).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, torch.mm(dy.t(), x.flatten(0, -2)) if ctx.needs_input_grad[3] else None
