# SPDX-License-Identifier: Apache-2.0
"""The weights of a combination of adapters, searched for on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from .batches import Collator, feature
from .data import load_splits
from .recipe import Recipe
from .rules import RULES
from .tokens import Encoder

STEPS = (0.5, 0.25, 0.125)


@dataclass
class HeldOut:
    """The mean loss of a model on a recipe's held-out examples, a token counting once."""

    batches: list[dict[str, torch.Tensor]]

    @classmethod
    def of(cls, recipe: Recipe, encoder: Encoder) -> HeldOut:
        """Those of the validation part, or of the test part. Raises `ConfigError` where there are none."""
        if RULES[recipe.task].type != "CAUSAL_LM":
            raise ConfigError(f"{recipe.place('task')} = {recipe.task!r}: a search goes by the loss of answers.")
        splits = load_splits(recipe.data, recipe.seed, recipe.folder)
        examples = splits.validation or splits.test
        if not examples:
            raise ConfigError(
                f"{recipe.place('data', 'validation')}: a search needs held-out examples; there are none."
            )
        rows = [feature(row) for example in examples for row in encoder(example)]
        size, collate = recipe.evaluation.batch_size, Collator(encoder.tokenizer.pad_token_id)
        return cls([collate(rows[i : i + size]) for i in range(0, len(rows), size)])

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Of the model as it is."""
        total = tokens = 0.0
        for batch in self.batches:
            count = int((batch["labels"][:, 1:] >= 0).sum())
            held = {k: v.to(model.device) for k, v in batch.items()}
            total += float(model(**held).loss) * count
            tokens += count
        return total / tokens


@dataclass
class Search:
    """Coordinate search: from even weights, each is moved by a step up and down while that helps; then by half of it.

    measure: what is to be small, of a list of weights. tried: what was measured.
    """

    measure: Callable[[list[float]], float]
    tried: dict[tuple[float, ...], float] = field(default_factory=dict)

    def run(self, count: int) -> list[float]:
        """The best weights of `count` adapters."""
        best = [round(1 / count, 3)] * count
        for alone in range(count):  # no mixture is worth it if one of them is better alone
            single = [float(i == alone) for i in range(count)]
            best = min(best, single, key=self._value)
        for step in STEPS:
            while (found := min(self._around(best, step), key=self._value)) != best:
                best = found
        return best

    def _around(self, weights: Sequence[float], step: float) -> list[list[float]]:
        moves = [(i, sign) for i in range(len(weights)) for sign in (1, -1)]
        moved = [[round(w + sign * step * (i == j), 3) for j, w in enumerate(weights)] for i, sign in moves]
        return [list(weights), *moved]

    def _value(self, weights: Sequence[float]) -> float:
        key = tuple(weights)
        if key not in self.tried:
            self.tried[key] = self.measure(list(weights))
        return self.tried[key]
