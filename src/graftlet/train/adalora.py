# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's budget: which of all layers' triplets stay, decided step by step while a model is trained (2303.10512).

    importance  I <- b1 I + (1 - b1) |p dp|,    uncertainty  U <- b2 U + (1 - b2) | |p dp| - I |,    score = I U

A triplet's score is that of its e, plus the means of those of its row of A and of its column of B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.host import hosts
from ..core.layer import AdaptedLayer
from ..errors import ConfigError
from ..methods.adalora import AdaLoRA, AdaLoraConfig

PARTS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """Shrinks an AdaLoRA adapter to its budget. Call `update_and_allocate` after every backward pass and optimizer step,
    before gradients are cleared.

    Args:
        model: a model with the adapter in its layers. adapter_name: the adapter.

    Raises:
        ConfigError: the adapter is no AdaLoRA.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        found = [h for _, h in hosts(model) if isinstance(h, AdaptedLayer) and adapter_name in h.adapters]
        if not found or not all(isinstance(h.methods[adapter_name], AdaLoRA) for h in found):
            raise ConfigError(
                f"adapter {adapter_name!r} is no AdaLoRA adapter of this model; only those have a budget."
            )
        self.adapter, self.layers = adapter_name, {h.keys[adapter_name]: h for h in found}
        config = found[0].configs[adapter_name]
        assert isinstance(config, AdaLoraConfig)
        self.config = config
        self.start = sum(len(self._part(h, "lora_E")) for h in found)
        self.target = config.target_r * len(found)
        self._importance: dict[tuple[str, str], Tensor] = {}
        self._uncertainty: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Take the step's gradients in; cut, where the plan has a cut at this step; keep what is cut at zero at the end."""
        last = (self.config.total_step or 0) - self.config.tfinal
        if step <= last:
            self._observe()
        if step == last or (self.config.tinit < step < last and step % self.config.deltaT == 0):
            self.config.rank_pattern = self._choose(self.target if step == last else self.budget(step))
        if self.config.rank_pattern is not None and (step >= last or step % self.config.deltaT == 0):
            self._cut(self.config.rank_pattern)

    def budget(self, step: int) -> int:
        """How many triplets all layers may keep at a step: it falls with the cube of the steps that are left."""
        first, last = self.config.tinit, (self.config.total_step or 0) - self.config.tfinal
        left = 1 - (min(max(step, first), last) - first) / (last - first)
        return int((self.start - self.target) * left**3 + self.target)

    def _part(self, layer: AdaptedLayer, name: str) -> Tensor:
        return layer.tensor(self.adapter, name)

    def _observe(self) -> None:
        for key, layer in self.layers.items():
            for part in PARTS:
                p = self._part(layer, part)
                if p.grad is None:
                    continue
                felt = (p * p.grad).abs()
                mean = self._importance.setdefault((key, part), torch.zeros_like(felt))
                spread = self._uncertainty.setdefault((key, part), torch.zeros_like(felt))
                mean.mul_(self.config.beta1).add_(felt, alpha=1 - self.config.beta1)
                spread.mul_(self.config.beta2).add_((felt - mean).abs(), alpha=1 - self.config.beta2)

    def _scores(self, key: str) -> Tensor:
        """One score a triplet of a layer."""
        A, B, e = (self._importance[key, part] * self._uncertainty[key, part] for part in PARTS)
        return e.flatten() + A.mean(1) + B.mean(0)

    def _choose(self, budget: int) -> dict[str, list[bool]]:
        """The triplets that score above the highest score that must go."""
        scores = {key: self._scores(key) for key in self.layers}
        everything = torch.cat([s.cpu() for s in scores.values()])
        surplus = len(everything) - budget
        bar = everything.kthvalue(surplus).values if surplus > 0 else -torch.inf
        return {f"{key}.lora_E": (s.cpu() > bar).tolist() for key, s in scores.items()}

    def _cut(self, kept: dict[str, list[bool]]) -> None:
        for key, layer in self.layers.items():
            e = self._part(layer, "lora_E")
            mask = torch.tensor(kept[f"{key}.lora_E"], device=e.device)
            if len(mask) == len(e):
                e.mul_(mask[:, None])
