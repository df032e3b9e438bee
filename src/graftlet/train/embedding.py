# SPDX-License-Identifier: Apache-2.0
"""Embeddings: texts that belong together come to be near (arXiv 1705.00652).   loss = -log softmax(cos(a, p) / t)[own p]

a is an anchor, p its own text among those of the whole batch. The model, its Trainer and the loss are sentence-transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..requirements import Requirement
from .base import pick_device, pick_dtype
from .batches import Collate, Feature, padded
from .data import Example
from .recipe import ModelTable
from .score import Score
from .task import Task
from .tokens import Encoder
from .trainer import AdapterTrainer

SENTENCES = Requirement("task = 'embedding'", "sentence-transformers", ">=6.2,<7")
COLUMNS = ("anchor", "positive", "negative")


def load_sentences(folder: str, table: ModelTable) -> Any:
    """A model of sentences on its device, in its number type; one without a pooling of its own takes the mean."""
    SENTENCES.check()
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    device = pick_device(table.device)
    told = {"dtype": pick_dtype(table.dtype, device), "attn_implementation": table.attention}
    made: Any = SentenceTransformer(folder, device=str(device), revision=table.revision, model_kwargs=told)
    made.model_card_data.generate_widget_examples = False  # the folder gets the adapter's own card
    return made


def around(whole: Any, model: Any) -> Any:
    """A model of sentences with `model` in the place of its transformer."""
    whole[0].model = model
    return whole


class Embedding(Task):
    """Learns which texts belong together: `prompt` and `completion`, and perhaps not `rejected`."""

    unit: ClassVar[str] = "pair"

    def check(self) -> None:
        SENTENCES.check()

    def base(self, folder: str) -> Any:
        self.whole = load_sentences(folder, self.recipe.model)
        return self.whole[0].model

    def features(self, encoder: Encoder, example: Example) -> list[Feature]:
        texts = [example.messages[-2]["content"], example.answer, *([example.rejected] if example.rejected else [])]
        named = dict(zip(COLUMNS, texts, strict=False))
        ids = {f"{name}_input_ids": list(encoder.tokenizer(text)["input_ids"]) for name, text in named.items()}
        return [{**{name: [text] for name, text in named.items()}, **ids}]

    def opening(self, pad: int) -> Collate:
        return lambda features: padded([f["anchor_input_ids"] for f in features], pad)

    def trainer(self, **arguments: Any) -> AdapterTrainer:
        from .sentences import SentenceTrainer

        del arguments["data_collator"]  # it has its own
        model = around(self.whole, arguments.pop("model"))
        for name in ("train_dataset", "eval_dataset"):
            if arguments.get(name) is not None:
                arguments[name] = _columns(arguments[name])
        return SentenceTrainer(model=model, **arguments)

    @property
    def arguments(self) -> type:
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformerTrainingArguments,
        )

        return SentenceTransformerTrainingArguments

    @property
    def metric(self) -> str:
        return "recall"

    def measure(self, encoder: Encoder, examples: Sequence[Example]) -> PairFinder:
        return PairFinder(self, examples, self.recipe.evaluation.batch_size)


def _columns(rows: Any) -> Any:
    from datasets import Dataset

    found = [rows[i] for i in range(len(rows))]
    return Dataset.from_dict({name: [row[name][0] for row in found] for name in COLUMNS if name in found[0]})


class PairFinder:
    """The share of anchors whose own text is the nearest of all."""

    def __init__(self, task: Embedding, examples: Sequence[Example], size: int) -> None:
        self.task, self.examples, self.size = task, examples, size

    def __call__(self, model: Any) -> Score:
        """The nearest text of each anchor."""
        answers = self.samples(model, len(self.examples))
        return Score(tuple(answers), tuple(a == e.answer for a, e in zip(answers, self.examples, strict=True)))

    @torch.no_grad()
    def samples(self, model: Any, count: int) -> list[str]:
        """The nearest of all texts to the first `count` anchors."""
        if not count or not self.examples:
            return []
        whole = around(self.task.whole, model)
        asked = [e.messages[-2]["content"] for e in self.examples[:count]]
        texts = [e.answer for e in self.examples]
        anchors, held = (
            whole.encode(
                part, batch_size=self.size, convert_to_tensor=True, show_progress_bar=False, normalize_embeddings=True
            )
            for part in (asked, texts)
        )
        return [texts[i] for i in (anchors @ held.T).argmax(1).tolist()]
