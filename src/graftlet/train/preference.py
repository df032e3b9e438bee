# SPDX-License-Identifier: Apache-2.0
"""DPO: direct preference optimisation (arXiv 2305.18290).   loss = -log sigmoid(beta ((p - r) of chosen - (p - r) of rejected))

p is the log-probability that the model gives to an answer, r the one that the reference gives to it. The reference is the model
with its adapter off, so there is no second copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .batches import Collate, Collator, Feature
from .data import Example
from .recipe import PreferenceTable
from .task import Task
from .tokens import IGNORED, Encoder
from .trainer import AdapterTrainer, RowTrainer

REJECTED = "rejected_"


def pair(encoder: Encoder, example: Example) -> Feature:
    """The answer that is preferred and the one that is not, as one row. Raises `ConfigError` where they are the same."""
    assert example.rejected is not None
    if example.rejected == example.answer:
        raise ConfigError(f"data.rejected: the rejected answer is the preferred one: {example.answer[:80]!r}.")
    other = Example((*example.messages[:-1], {**example.messages[-1], "content": example.rejected}))
    chosen, rejected = encoder(example)[-1], encoder(other)[-1]
    found = {"input_ids": chosen.input_ids, "labels": chosen.labels}
    return {**found, f"{REJECTED}input_ids": rejected.input_ids, f"{REJECTED}labels": rejected.labels}


class PairCollator:
    """Pairs to one batch: the preferred answers' rows, then those of the others in the same order."""

    def __init__(self, pad: int) -> None:
        self.collate = Collator(pad)

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        names = ("input_ids", "labels")
        rejected = [{name: f[f"{REJECTED}{name}"] for name in names} for f in features]
        return self.collate([*features, *rejected])


class Preference(Task):
    """Learns which of two answers is better."""

    unit = "pair"
    merges = False  # a merged model has no adapter that could be off

    def features(self, encoder: Encoder, example: Example) -> list[Feature]:
        return [pair(encoder, example)]

    def collator(self, pad: int, base: Any, config: Any) -> Collate:
        return PairCollator(pad)

    def trainer(self, **arguments: Any) -> AdapterTrainer:
        return PreferenceTrainer(**arguments, beta=(self.recipe.preference or PreferenceTable()).beta)


class PreferenceTrainer(RowTrainer):
    """A Trainer of pairs. beta: how far the model may go from the reference; the smaller, the further."""

    def __init__(self, *args: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.no_grad(), self.adapted.disable_adapter():
            reference, _ = log_probabilities(self.model, inputs)
        policy, outputs = log_probabilities(model, inputs)
        loss = preference_loss(policy, reference, self.beta)
        return (loss, outputs) if return_outputs else loss


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Of each row's answer, `[rows]`, and what the model gave."""
    outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    labels = batch["labels"][:, 1:]
    logits = outputs.logits[:, -batch["labels"].shape[1] : -1]  # a prompt method has put rows before them
    found = -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return found.view_as(labels).sum(1), outputs


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The mean over pairs; preferred answers are the first half of `policy` and of `reference`."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()
