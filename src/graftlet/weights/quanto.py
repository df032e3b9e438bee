# SPDX-License-Identifier: Apache-2.0
"""optimum-quanto: its own linear layers, whose weight is a tensor of a special class once they are frozen."""

from __future__ import annotations

from typing import Any, cast

import torch
from optimum.quanto import QTensor, quantize_weight
from optimum.quanto.tensor import AbsmaxOptimizer, MaxOptimizer
from torch import Tensor, nn

from .storage import Storage, Wrapped, rounded


class Quanto(Wrapped):
    """`QLinear`. Before it is frozen, its weight is a plain one that each call quantises."""

    backend = "quanto"

    def read(self, module: nn.Module, name: str) -> Tensor:
        kept = self.tensor(module, name)
        return super().read(module, name) if isinstance(kept, QTensor) else kept

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        if isinstance(self.tensor(module, name), QTensor):
            super().write(module, name, value)
        else:
            Storage.write(self, module, name, value)

    def requantised(self, module: nn.Module, like: Any, value: Tensor) -> Tensor:
        """With the scales that quanto finds where it is not told otherwise."""
        qtype, group = like.qtype, getattr(like, "_group_size", None)
        if qtype.bits == 8:
            scale, shift = AbsmaxOptimizer()(value, qtype, like.axis), None
        else:
            scale, shift = cast(Any, MaxOptimizer()(value, qtype, like.axis, group))
        calls = getattr(like, "activation_qtype", None)
        return quantize_weight(value, qtype, like.axis, scale, shift, group, calls)

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        like = cast(Any, self.tensor(module, name))
        if not isinstance(like, QTensor):
            return Storage.allowed(self, module, name, meant)
        qtype = cast(Any, like).qtype
        half = torch.finfo(qtype.dtype).eps / 2 if qtype.is_floating_point else 1 / (2**qtype.bits - 2)
        return rounded(meant, half, getattr(like, "_group_size", None) or 0, torch.finfo(like.dtype).eps)

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        return super().recall(module, name, saved) if isinstance(saved, QTensor) else saved


QUANTO = Quanto()
