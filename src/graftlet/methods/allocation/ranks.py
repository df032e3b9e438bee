# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's budget: which of all layers' triplets stay, decided step by step while a model is trained (2303.10512).

A triplet's score is that of its e, plus the means of those of its row of A and of its column of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.method import Holder
from . import Importance, falling

PARTS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """Shrinks an adapter of triplets to its budget.

    Args:
        layers: the adapter's layers, by path. adapter: its name. config: an `AdaLoraConfig`, whose `rank_pattern` it fills.
    """

    def __init__(self, layers: Mapping[str, Holder], adapter: str, config: Any) -> None:
        self.layers, self.adapter, self.config = layers, adapter, config
        self.start = sum(len(self._part(key, "lora_E")) for key in layers)
        self.target = config.target_r * len(layers)
        self.importance = Importance(config.beta1, config.beta2)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Take the step's gradients in; cut, where the plan has a cut at this step; keep what is cut at zero at the end."""
        last = self.config.total_step - self.config.tfinal
        if step <= last:
            for key in self.layers:
                for part in PARTS:
                    self.importance.observe(f"{key}.{part}", self._part(key, part))
        if step == last or (self.config.tinit < step < last and step % self.config.deltaT == 0):
            self.config.rank_pattern = self._choose(self.target if step == last else self.budget(step))
        if self.config.rank_pattern is not None and (step >= last or step % self.config.deltaT == 0):
            self._cut(self.config.rank_pattern)

    def budget(self, step: int) -> int:
        """How many triplets all layers may keep at a step: it falls with the cube of the steps that are left."""
        return falling(step, self.config.tinit, self.config.total_step - self.config.tfinal, self.start, self.target)

    def state(self) -> dict[str, Tensor]:
        """The importance so far, and which triplets are left."""
        left = self.config.rank_pattern or {}
        return self.importance.state() | {f"left/{key}": torch.tensor(mask) for key, mask in left.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.importance.load(state)
        left = {k.removeprefix("left/"): mask.tolist() for k, mask in state.items() if k.startswith("left/")}
        self.config.rank_pattern = left or None

    def _part(self, key: str, name: str) -> Tensor:
        return self.layers[key].tensor(self.adapter, name)

    def _scores(self, key: str) -> Tensor:
        """One score a triplet of a layer."""
        A, B, e = (self.importance.score(f"{key}.{part}") for part in PARTS)
        return e.flatten() + A.mean(1) + B.mean(0)

    def _choose(self, budget: int) -> dict[str, list[bool]]:
        """The triplets that score above the highest score that must go."""
        scores = {key: self._scores(key) for key in self.layers}
        everything = torch.cat([s.cpu() for s in scores.values()])
        surplus = len(everything) - budget
        bar = everything.kthvalue(surplus).values if surplus > 0 else -torch.inf
        return {f"{key}.lora_E": (s.cpu() > bar).tolist() for key, s in scores.items()}

    def _cut(self, kept: dict[str, list[bool]]) -> None:
        for key in self.layers:
            e = self._part(key, "lora_E")
            mask = torch.tensor(kept[f"{key}.lora_E"], device=e.device)
            if len(mask) == len(e):
                e.mul_(mask[:, None])
