# SPDX-License-Identifier: Apache-2.0
"""The task classes: what `task_type` makes of a `PeftModel`.

A classification task trains the model's head whole, as a copy. The rest is shared: what a prompt method does to a call
of each task stands in `prompting`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..config import PeftConfig
from ..core.target import HEADS_OF
from .peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel


class _TaskModel(PeftModel):
    task: ClassVar[str] = ""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> None:
        self._prepare(peft_config)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare(self, config: PeftConfig) -> None:
        add_heads(config, HEADS_OF.get(self.task, ()))


def add_heads(config: PeftConfig, heads: tuple[str, ...]) -> None:
    """Train a task's head along with the adapter, where the config can say so."""
    if heads and any(f == "modules_to_save" for f in type(config).__dataclass_fields__):
        given = [*(config.modules_to_save or [])]
        config.modules_to_save = [*given, *(h for h in heads if h not in given)]  # type: ignore[assignment]


class PeftModelForSequenceClassification(_TaskModel):
    """A classifier of whole sequences."""

    task = "SEQ_CLS"


class PeftModelForTokenClassification(_TaskModel):
    """A classifier of tokens."""

    task = "TOKEN_CLS"


class PeftModelForQuestionAnswering(_TaskModel):
    """A model that marks an answer's start and end."""

    task = "QUESTION_ANS"


class PeftModelForCausalLM(_TaskModel):
    """A language model that continues text."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportCallIssue]


class PeftModelForSeq2SeqLM(_TaskModel):
    """A language model that answers one text with another."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportCallIssue]


class PeftModelForFeatureExtraction(_TaskModel):
    """A model whose hidden states are wanted."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING.update(
    SEQ_CLS=PeftModelForSequenceClassification,
    SEQ_2_SEQ_LM=PeftModelForSeq2SeqLM,
    CAUSAL_LM=PeftModelForCausalLM,
    TOKEN_CLS=PeftModelForTokenClassification,
    QUESTION_ANS=PeftModelForQuestionAnswering,
    FEATURE_EXTRACTION=PeftModelForFeatureExtraction,
)
