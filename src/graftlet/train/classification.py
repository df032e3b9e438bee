# SPDX-License-Identifier: Apache-2.0
"""Classification: a text's label.   loss = -log softmax(W h)[label], or (w h - label)^2 where labels are amounts

h is the model's last state of the text, W the head: new for these labels, trained whole and saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, listing
from .batches import Collate, Feature, padded
from .data import Example
from .score import Estimates, Score, evaluating, in_batches
from .task import Task
from .tokens import Encoder
from .trainer import AdapterTrainer, RowTrainer


@dataclass(frozen=True)
class Labels:
    """names: the classes, in order; empty where labels are amounts."""

    names: tuple[str, ...]

    def target(self, label: str) -> float | int:
        """What the head is to give for a label."""
        return self.names.index(label) if self.names else float(label)

    def told(self, logits: Tensor) -> list[str]:
        """The labels that scores `[rows, outputs]` stand for."""
        if self.names:
            return [self.names[i] for i in logits.argmax(1).tolist()]
        return [f"{v:.5g}" for v in logits[:, 0].tolist()]


def labels_from(facts: dict[str, Any]) -> Labels:
    """Those that a run's summary tells."""
    return Labels(tuple(facts["labels"]))


def labels_of(texts: Sequence[str]) -> Labels:
    """What labels there are: amounts where all are numbers and not all whole, else classes by number or by name.

    Raises `ConfigError` where one is empty or not finite, or all are the same.
    """
    if any(not text.strip() or text == "None" for text in texts):
        raise ConfigError("a row has no label; leave it out by data.where")
    kinds = {text: _number(text) for text in dict.fromkeys(texts)}
    numbers = [n for n in kinds.values() if n is not None]
    if len(numbers) == len(kinds) and any(isinstance(n, float) for n in numbers):
        if not all(math.isfinite(n) for n in numbers):
            raise ConfigError(f"labels that are amounts must be finite, which {listing(kinds)} are not")
        return Labels(())
    if len(kinds) < 2:
        raise ConfigError(f"all rows have the label {texts[0]!r}; there is nothing to tell apart")
    by_number = len(numbers) == len(kinds)
    return Labels(tuple(sorted(kinds, key=lambda text: (kinds[text] if by_number else 0, text))))


def _number(text: str) -> float | int | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


class LabelCollator:
    """Rows with their labels to one batch, filled up on the right."""

    def __init__(self, pad: int, amounts: bool) -> None:
        self.pad, self.kind = pad, torch.float32 if amounts else torch.long

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        labels = torch.tensor([f["labels"][0] for f in features], dtype=self.kind)
        return {**padded([f["input_ids"] for f in features], self.pad), "labels": labels}


class Classification(Task):
    """Learns which label a text has."""

    unit = "text"
    labels: Labels

    def look(self, examples: Sequence[Example], tokenizer: Any) -> None:
        try:
            self.labels = labels_of([e.answer for e in examples])
        except ConfigError as error:
            raise ConfigError(f"{self.recipe.place('data', 'label')}: {error.args[0]}.") from error
        names = self.labels.names
        self.facts = {"labels": list(names), "outputs": len(names) or 1}
        problem = "single_label_classification" if names else "regression"
        named = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
        self.head = {
            "num_labels": len(names) or 1,
            **named,
            "problem_type": problem,
            "pad_token_id": tokenizer.pad_token_id,
            "ignore_mismatched_sizes": True,  # a head for other labels, which the folder may have
        }

    def features(self, encoder: Encoder, example: Example) -> list[Feature]:
        return [{"input_ids": encoder.prompt(example.messages[:-1]), "labels": [self.labels.target(example.answer)]}]

    def group(self, example: Example) -> str:
        return example.group or (example.answer if self.labels.names else "")

    def collator(self, pad: int, base: Any, config: Any) -> Collate:
        return self.opening(pad)

    def opening(self, pad: int) -> Collate:
        return LabelCollator(pad, not self.labels.names)

    def trainer(self, **arguments: Any) -> AdapterTrainer:
        return RowTrainer(**arguments)

    @property
    def metric(self) -> str:
        return "accuracy" if self.labels.names else "squared_error"

    def measure(self, encoder: Encoder, examples: Sequence[Example]) -> LabelScorer:
        limit = self.recipe.data.max_length
        fitting = [e for e in examples if len(encoder.prompt(e.messages[:-1])) <= limit]
        return LabelScorer(encoder, fitting, self.labels, self.recipe.evaluation.batch_size)


class LabelScorer:
    """Compares the labels that a model gives to texts with the right ones."""

    def __init__(self, encoder: Encoder, examples: Sequence[Example], labels: Labels, size: int) -> None:
        self.examples, self.labels, self.size = examples, labels, size
        self.pad = encoder.tokenizer.pad_token_id
        self.rows = [encoder.prompt(e.messages[:-1]) for e in examples]

    def __call__(self, model: Any) -> Score:
        """Accuracy, or the mean squared error of amounts."""
        logits, right = self._logits(model, self.rows), [e.answer for e in self.examples]
        answers = tuple(self.labels.told(logits))
        if self.labels.names:
            return Score(answers, tuple(a == b for a, b in zip(answers, right, strict=True)))
        off = logits[:, 0] - torch.tensor([float(r) for r in right])
        return Estimates(answers, (), float(off.square().mean()))

    def samples(self, model: Any, count: int) -> list[str]:
        """The labels that a model gives to the first `count` texts."""
        return self.labels.told(self._logits(model, self.rows[:count])) if count and self.rows else []

    def _logits(self, model: Any, rows: list[list[int]]) -> Tensor:
        return scores_of(model, rows, self.size, self.pad)


@torch.no_grad()
def scores_of(model: Any, rows: Sequence[list[int]], size: int, pad: int) -> Tensor:
    """What the head of a model says of rows of tokens, `[rows, outputs]`, in their order, on the CPU."""
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for chosen in in_batches(rows, size):
            batch = {k: v.to(model.device) for k, v in padded([rows[i] for i in chosen], pad).items()}
            found.update(zip(chosen, model(**batch).logits.float().cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])
