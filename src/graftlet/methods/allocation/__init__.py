# SPDX-License-Identifier: Apache-2.0
"""What decides, while a model is trained, which parts of an adapter stay: how much each part matters, and until when."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Importance:
    """How much the entries of tensors matter to the loss.

        mean I <- b1 I + (1 - b1) |p dp|,    spread U <- b2 U + (1 - b2) | |p dp| - I |,    score = I U

    lagging: the spread is taken about the mean as it was before this step.
    """

    def __init__(self, beta1: float, beta2: float, lagging: bool = False) -> None:
        self.beta1, self.beta2, self.lagging = beta1, beta2, lagging
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    def observe(self, key: str, p: Tensor) -> None:
        """Take in the gradient that a tensor has; nothing where it has none."""
        if p.grad is None:
            return
        felt = (p * p.grad).abs()
        mean = self.mean.setdefault(key, torch.zeros_like(felt))
        spread = self.spread.setdefault(key, torch.zeros_like(felt))
        before = mean.clone() if self.lagging else mean
        mean.mul_(self.beta1).add_(felt, alpha=1 - self.beta1)
        spread.mul_(self.beta2).add_((felt - before).abs(), alpha=1 - self.beta2)

    def score(self, key: str) -> Tensor:
        """A tensor's score, entry by entry."""
        return self.mean[key] * self.spread[key]

    def forget(self) -> None:
        """Begin anew."""
        self.mean, self.spread = {}, {}

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on later."""
        kinds = {"mean": self.mean, "spread": self.spread}
        return {f"{kind}/{key}": tensor for kind, held in kinds.items() for key, tensor in held.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.forget()
        kinds = {"mean": self.mean, "spread": self.spread}
        for name, tensor in state.items():
            kind, _, key = name.partition("/")
            if kind in kinds:
                kinds[kind][key] = tensor.clone()


def falling(step: int, first: int, last: int, most: int, least: int, exponent: float = 3) -> int:
    """How many parts may stay at a step: all until `first`, then fewer by a power of the steps left, `least` from `last`."""
    left = 1 - (min(max(step, first), last) - first) / max(last - first, 1)
    return int((most - least) * left**exponent + least)
