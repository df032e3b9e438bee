# SPDX-License-Identifier: Apache-2.0
"""Trained adapters that write no text, put to use from their folders: `graftlet generate` is for the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import CallError
from ..model.peft_model import PeftModel
from .adapter import Opened, open_adapter, place_adapter, summary_of
from .classification import labels_from, scores_of
from .data import Example
from .embedding import around, load_sentences

BATCH = 16


def classify(adapter: str | os.PathLike[str], texts: Sequence[str], **where: Any) -> list[str]:
    """The label of each text, put into the recipe's words; amounts as numbers in text.

    Args:
        adapter: the folder of a run of task `classification`.
        where: `base`, `dtype` and `device`, as of `open_adapter`.

    Raises:
        CallError: the adapter is of another task. AdapterFileError: no adapter there, or its base is not found.
    """
    summary = _of(adapter, "classification")
    if not texts:
        return []
    opened = open_adapter(str(adapter), **where)
    rows = [opened.encoder.prompt(opened.messages(text)) for text in texts]
    return labels_from(summary["data"]).told(_scores(opened, rows))


def scores(adapter: str | os.PathLike[str], pairs: Sequence[tuple[str, str]], **where: Any) -> list[float]:
    """How good each answer is to its question; the question is put into the recipe's words.

    Args:
        adapter: the folder of a run of task `reward`.
        pairs: a question and an answer each. where: `base`, `dtype` and `device`, as of `open_adapter`.

    Raises as `classify` does.
    """
    _of(adapter, "reward")
    if not pairs:
        return []
    opened = open_adapter(str(adapter), **where)
    said = [(*opened.messages(asked), {"role": "assistant", "content": answer}) for asked, answer in pairs]
    return _scores(opened, [opened.encoder(Example(messages))[-1].input_ids for messages in said])[:, 0].tolist()


def sentences(adapter: str | os.PathLike[str], **where: Any) -> Any:
    """sentence-transformers' model with the adapter in it: `sentences(adapter).encode(texts)`.

    Args:
        adapter: the folder of a run of task `embedding`. where: `base`, `dtype` and `device`, as of `open_adapter`.

    Raises as `classify` does, and `DependencyError` where sentence-transformers is missing.
    """
    _of(adapter, "embedding")
    given = {"base": None, "dtype": None, "device": "auto", **where}
    placed = place_adapter(str(adapter), **given)
    whole = load_sentences(placed.folder, placed.table)
    return around(whole, PeftModel.from_pretrained(whole[0].model, str(adapter)).eval())


def _scores(opened: Opened, rows: list[list[int]]) -> Any:
    return scores_of(opened.model, rows, BATCH, opened.encoder.tokenizer.pad_token_id)


def _of(adapter: str | os.PathLike[str], task: str) -> dict[str, Any]:
    """The summary of a run, which must have been of the task."""
    summary = summary_of(str(adapter))
    own = summary.get("recipe", {}).get("task")
    if own != task:
        found = f"a run of task {own!r}" if own else "no run of a recipe: there is no summary.json"
        raise CallError(f"{adapter} is {found}; a run of task {task!r} is needed.")
    return summary
