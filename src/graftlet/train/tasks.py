# SPDX-License-Identifier: Apache-2.0
"""The table of tasks."""

from __future__ import annotations

from .answers import Answers
from .classification import Classification
from .embedding import Embedding
from .preference import Preference
from .recipe import Recipe
from .reward import Reward
from .task import Task

TASKS: dict[str, type[Task]] = {
    "sft": Answers,
    "dpo": Preference,
    "reward": Reward,
    "embedding": Embedding,
    "classification": Classification,
}
"""By the name that a recipe calls it by; what each asks of a recipe stands in `rules.py`."""


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    return TASKS[recipe.task](recipe)
