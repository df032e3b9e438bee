# SPDX-License-Identifier: Apache-2.0
"""A layer as a product with its weight, for those who would rather make the product themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class Product(NamedTuple):
    """`y = x W^T + b`, W `[out, in]` or what reads it. casts: the input is brought to `dtype`, the output back to its own."""

    W: Tensor | Callable[[], Tensor]
    b: Tensor | None
    dtype: torch.dtype
    casts: bool = False


class Weighted(nn.Module):
    """A module that stands in for a layer and can tell the weight it works with."""

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias as adapted, in the layer's own layout."""
        raise NotImplementedError


def watched(module: nn.Module) -> bool:
    """Whether anything is done before or after a call of a module, or in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or "forward" in module.__dict__ or _has_any_global_hook())
