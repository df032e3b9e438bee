# SPDX-License-Identifier: Apache-2.0
"""A model of a few layers that is called more than once, for what one call leaves for the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Stack(nn.Module):
    """Layers one after another; recomputed in backward where that is asked for."""

    def __init__(self, layers: Iterable[nn.Module], again: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.again = again
        self._gradient_checkpointing_func = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.again:
                x = self.__dict__["_gradient_checkpointing_func"](layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def stepped(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The output of a step, and all gradients by their parameters' names."""
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
