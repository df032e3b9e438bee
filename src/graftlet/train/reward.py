# SPDX-License-Identifier: Apache-2.0
"""A reward model: how good an answer is, as one number (arXiv 2203.02155).   loss = -log sigmoid(s(chosen) - s(rejected))

s is a head of one output on the model's last state of question and answer, trained whole and saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from .batches import Collate, Feature, padded
from .classification import scores_of
from .data import Example
from .preference import REJECTED, pair
from .score import Score
from .task import Task
from .tokens import Encoder
from .trainer import AdapterTrainer, RowTrainer


class RewardCollator:
    """Pairs to one batch: the rows of the better answers, then those of the others in the same order.

    Their labels say which is which, +1 and -1: for a start from data, they are what the head is to give.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        rows = [f[f"{kind}input_ids"] for kind in ("", REJECTED) for f in features]
        labels = torch.tensor([1.0] * len(features) + [-1.0] * len(features))
        return {**padded(rows, self.pad), "labels": labels}


class Reward(Task):
    """Learns how good answers are, from pairs of a better and a worse one."""

    unit: ClassVar[str] = "pair"

    def look(self, examples: Sequence[Example], tokenizer: Any) -> None:
        pad = tokenizer.pad_token_id
        self.head = {
            "num_labels": 1,
            "problem_type": "regression",
            "pad_token_id": pad,
            "ignore_mismatched_sizes": True,
        }

    def features(self, encoder: Encoder, example: Example) -> list[Feature]:
        found = pair(encoder, example)
        return [{key: row for key, row in found.items() if key.endswith("input_ids")}]

    def collator(self, pad: int, base: Any, config: Any) -> Collate:
        return RewardCollator(pad)

    def opening(self, pad: int) -> Collate:
        return RewardCollator(pad)

    def trainer(self, **arguments: Any) -> AdapterTrainer:
        return RewardTrainer(**arguments)

    @property
    def metric(self) -> str:
        return "ranked"

    def measure(self, encoder: Encoder, examples: Sequence[Example]) -> PairScorer:
        rows = [(e, self.features(encoder, e)[0]) for e in examples]
        limit = self.recipe.data.max_length
        fitting = [(e, row) for e, row in rows if all(len(ids) <= limit for ids in row.values())]
        return PairScorer(fitting, self.recipe.evaluation.batch_size, encoder.tokenizer.pad_token_id)


class RewardTrainer(RowTrainer):
    """A Trainer of pairs."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        better, worse = outputs.logits[:, 0].float().chunk(2)
        loss = -F.logsigmoid(better - worse).mean()
        return (loss, outputs) if return_outputs else loss


class PairScorer:
    """The share of pairs whose better answer gets the higher score."""

    def __init__(self, pairs: Sequence[tuple[Example, Feature]], size: int, pad: int) -> None:
        self.examples, self.rows = [e for e, _ in pairs], [row for _, row in pairs]
        self.size, self.pad = size, pad

    def __call__(self, model: Any) -> Score:
        """Which answer of each pair a model prefers."""
        right = tuple(better > worse for better, worse in self._scores(model, self.rows))
        return Score(tuple("better" if r else "worse" for r in right), right)

    def samples(self, model: Any, count: int) -> list[str]:
        """The scores of the first `count` pairs."""
        return [f"{better:.3f}, the worse one {worse:.3f}" for better, worse in self._scores(model, self.rows[:count])]

    def _scores(self, model: Any, rows: Sequence[Feature]) -> list[tuple[float, float]]:
        if not rows:
            return []
        answers = [row[f"{kind}input_ids"] for kind in ("", REJECTED) for row in rows]
        better, worse = scores_of(model, answers, self.size, self.pad)[:, 0].chunk(2)
        return list(zip(better.tolist(), worse.tolist(), strict=True))
