# SPDX-License-Identifier: Apache-2.0
"""A task: how its rows are read and put together, which model and Trainer learn them, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from transformers import TrainingArguments

from ..config import PeftConfig
from .base import load_base
from .batches import Collate, Collator, Feature
from .data import Example
from .recipe import Recipe
from .rules import RULES
from .score import Score, Scorer
from .tokens import Encoder
from .trainer import AdapterTrainer


class Measure(Protocol):
    """What puts the same examples to any model."""

    @property
    def examples(self) -> Sequence[Example]:
        """The examples."""
        ...

    def __call__(self, model: Any) -> Score:
        """How a model does on all of them."""
        ...

    def samples(self, model: Any, count: int) -> list[str]:
        """What a model makes of the first `count`."""
        ...


class Task:
    """What a run learns, by default answers. One object a run.

    unit: what the loss is a mean over. merges: whether the loss of a merged model can be told. head: what the base's class
    is to be told of the data. facts: what the summary says of the data.
    """

    unit: ClassVar[str] = "token"
    merges: ClassVar[bool] = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.head: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}

    def check(self) -> None:
        """Raise `DependencyError` where a package is missing that the task needs."""

    # data

    def look(self, examples: Sequence[Example], tokenizer: Any) -> None:
        """See all examples before any is encoded. Raises `ConfigError` where they cannot be learnt."""

    def features(self, encoder: Encoder, example: Example) -> list[Feature]:
        """The rows of one example."""
        raise NotImplementedError

    def arranged(self, rows: list[Feature]) -> list[Feature]:
        """The rows that are trained on, as they go into batches."""
        return rows

    def group(self, example: Example) -> str:
        """What the summary counts examples by."""
        return example.group

    def collator(self, pad: int, base: Any, config: PeftConfig) -> Collate:
        """What puts rows into a batch."""
        return Collator(pad)

    def opening(self, pad: int) -> Collate:
        """The same for a start from data, which asks the model itself for a loss."""
        return Collator(pad)

    # model

    def base(self, folder: str) -> Any:
        """The base model, loaded as the recipe says."""
        recipe = self.recipe
        return load_base(folder, recipe.model, recipe.quantization, RULES[recipe.task].type, self.head)

    @property
    def arguments(self) -> type:
        """The class of its Trainer's arguments."""
        return TrainingArguments

    def trainer(self, **arguments: Any) -> AdapterTrainer:
        """The Trainer of the task."""
        return AdapterTrainer(**arguments)

    # measurement

    @property
    def metric(self) -> str:
        """What is measured."""
        return self.recipe.evaluation.metric

    def measure(self, encoder: Encoder, examples: Sequence[Example]) -> Measure:
        """What measures it on examples."""
        return Scorer(encoder, examples, self.recipe.evaluation)
