# SPDX-License-Identifier: Apache-2.0
"""AdaMSS's adaptive subspace allocation: groups of rows that matter little are frozen while a model is trained.

From `init_warmup` to `final_warmup` gradients are watched; every `mask_interval` steps all layers' groups are ranked by
the mean score of their A plus that of their B, and as many as the plan allows go on learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.method import Holder
from . import Importance, falling


class SubspaceAllocator:
    """Freezes groups until `asa_target_subspaces` of all layers learn.

    Args:
        layers: the adapter's layers, by path. adapter: its name. config: an `AdamssConfig` with `use_asa`.
    """

    def __init__(self, layers: Mapping[str, Holder], adapter: str, config: Any) -> None:
        self.layers, self.adapter, self.config = layers, adapter, config
        self.groups = [(key, i) for key, layer in layers.items() for i in range(len(layer.view(adapter).groups))]
        self.importance = Importance(config.asa_importance_beta, config.asa_uncertainty_beta, lagging=True)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Take the step's gradients in, and freeze groups where the plan says so at this step."""
        if not self.config.init_warmup <= step <= self.config.final_warmup:
            return
        for group in self.groups:
            for name, tensor in self._pair(group).items():
                self.importance.observe(name, tensor)
        if step % self.config.mask_interval == 0:
            self._freeze(self.budget(step))
            self.importance.forget()

    def budget(self, step: int) -> int:
        """How many groups may learn at a step."""
        first, last = self.config.init_warmup, self.config.final_warmup
        target, exponent = self.config.asa_target_subspaces, self.config.asa_schedule_exponent
        return falling(step, first, last, len(self.groups), target, exponent)

    def state(self) -> dict[str, Tensor]:
        """The importance so far, and which groups are frozen."""
        learn = [all(t.requires_grad for t in self._pair(group).values()) for group in self.groups]
        return {**self.importance.state(), "learn": torch.tensor(learn)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.importance.load(state)
        for group, learns in zip(self.groups, state["learn"].tolist(), strict=True):
            self._let(group, learns)

    def _pair(self, group: tuple[str, int]) -> dict[str, Tensor]:
        key, i = group
        names = (f"adamss_A.{i}", f"adamss_B.{i}")
        return {f"{key}.{name}": self.layers[key].tensor(self.adapter, name) for name in names}

    def _freeze(self, budget: int) -> None:
        """Let the best of the groups that have learnt go on, and freeze the others."""
        watched = [g for g in self.groups if all(name in self.importance.mean for name in self._pair(g))]
        scores = {g: sum(float(self.importance.score(name).mean()) for name in self._pair(g)) for g in watched}
        for place, group in enumerate(sorted(watched, key=lambda g: -scores[g])):
            self._let(group, place < budget)

    def _let(self, group: tuple[str, int], learns: bool) -> None:
        for tensor in self._pair(group).values():
            tensor.requires_grad_(learns)
            tensor.grad = tensor.grad if learns else None
