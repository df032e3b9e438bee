# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers' Trainer with an adapter's checkpoints. Needs that package."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformerTrainer  # pyright: ignore[reportMissingImports]
from sentence_transformers.losses import MultipleNegativesRankingLoss  # pyright: ignore[reportMissingImports]

from ..model.peft_model import PeftModel
from .trainer import AdapterTrainer


class SentenceTrainer(AdapterTrainer, SentenceTransformerTrainer):
    """A Trainer of a model of sentences whose transformer has the adapter."""

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        super().__init__(*args, model=model, loss=MultipleNegativesRankingLoss(model), **kwargs)
        self.label_names, self.can_return_loss = [], True  # pairs are told by their columns
        self.model_accepts_loss_kwargs = False

    def _adapted(self) -> PeftModel | None:
        model = self.model[0].model
        return model if isinstance(model, PeftModel) else None
