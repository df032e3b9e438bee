# SPDX-License-Identifier: Apache-2.0
"""SFT: answers to questions.   loss = -log p of each token of an answer, a mean over tokens"""

from __future__ import annotations

from typing import Any

from ..config import PeftConfig
from .batches import Collate, Collator, Feature, feature, pack, takes_ends
from .data import Example
from .task import Task
from .tokens import Encoded, Encoder


class Answers(Task):
    """Learns to answer as the data does."""

    def features(self, encoder: Encoder, example: Example) -> list[Feature]:
        return [feature(row) for row in encoder(example)]

    def arranged(self, rows: list[Feature]) -> list[Feature]:
        if not self.recipe.training.packing:
            return rows
        return pack([Encoded(**row) for row in rows], self.recipe.data.max_length)

    def collator(self, pad: int, base: Any, config: PeftConfig) -> Collate:
        # a prompt makes the row longer than its labels
        return Collator(pad, takes_ends(base) and not config.is_prompt_learning)
