# SPDX-License-Identifier: Apache-2.0
"""What each task asks of a recipe, and which keys mean nothing to it: looked at before anything is loaded.

How a task reads its data, trains and measures stands in its own file; `tasks.py` is their table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Rules:
    """type: the task type of its adapter. learns: what is learnt. needs: keys that it cannot do without, and what they are.

    use: what a trained adapter that writes no text is used by.
    """

    type: str
    learns: str
    needs: dict[str, str] = field(default_factory=dict)
    use: str = ""


ANSWER = "a template of the worse answer"
RULES = {
    "sft": Rules("CAUSAL_LM", "answers"),
    "dpo": Rules("CAUSAL_LM", "which of two answers is better", {"data.rejected": ANSWER}),
    "reward": Rules(
        "SEQ_CLS",
        "how good an answer is",
        {"data.rejected": ANSWER},
        "graftlet.train.scores(adapter, pairs) says how good answers are",
    ),
    "embedding": Rules(
        "FEATURE_EXTRACTION",
        "which texts belong together",
        {},
        "graftlet.train.sentences(adapter).encode(texts) gives texts as vectors",
    ),
    "classification": Rules(
        "SEQ_CLS",
        "the label of a text",
        {"data.label": "the column of the labels"},
        "graftlet.train.classify(adapter, texts) gives texts' labels",
    ),
}

OWNED: dict[str, tuple[str, ...]] = {
    "data.system": ("sft", "dpo", "reward", "classification"),
    "data.chat": ("sft", "dpo", "reward", "classification"),
    "quantization": ("sft", "dpo", "reward", "classification"),
    "data.messages": ("sft", "dpo", "reward"),
    "data.completion": ("sft", "dpo", "reward", "embedding"),
    "data.rejected": ("dpo", "reward", "embedding"),
    "data.label": ("classification",),
    "training.packing": ("sft",),
    "preference": ("dpo",),
    "evaluation.metric": ("sft", "dpo"),
    "evaluation.choices": ("sft", "dpo"),
}
"""Keys that not every task has a use for, and those that have."""


def complaints(recipe: Any) -> Iterator[tuple[str, str]]:
    """What of a recipe does not go with its task: the key, and what is wrong with it."""
    task = recipe.task
    for key, what in RULES[task].needs.items():
        if not _given(recipe, key):
            yield key, f"task = {task!r} needs {key}: {what}"
    for key, owners in OWNED.items():
        if task not in owners and _given(recipe, key):
            names = " or ".join(f"task = {owner!r}" for owner in owners)
            yield key, f"this key is for {names}, not for {task!r}; leave it out"
    given = recipe.adapter.fields.get("task_type", RULES[task].type)
    if given != RULES[task].type:
        yield "adapter.task_type", f"task = {task!r} makes {RULES[task].type} adapters, not {given!r}; leave it out"


def _given(table: BaseModel, key: str) -> bool:
    """Whether a key of a recipe has another value than it has by itself."""
    *path, name = key.split(".")
    for step in path:
        table = getattr(table, step)
    default = type(table).model_fields[name].get_default(call_default_factory=True)
    return getattr(table, name) != default
