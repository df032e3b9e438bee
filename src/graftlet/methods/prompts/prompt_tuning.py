# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning: a soft prompt before the input (arXiv 2104.08691).   inputs = [P ; E(x)]

P `[tokens * submodules, dim]` starts at random, at words of the vocabulary, or at the words of a text.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config import PromptLearningConfig
from ...core.prompt import Prompt
from ...errors import ConfigError, DependencyError
from ...registry import method


class PromptTuningInit(str, enum.Enum):
    """How a soft prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"

    __str__ = str.__str__


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning.

    Args:
        num_virtual_tokens: the prompt's length.
        prompt_tuning_init: RANDOM; SAMPLE_VOCAB, random words' embeddings; TEXT, those of a text.
        prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: for TEXT: the text, and the tokenizer with
            its arguments. The text is repeated or cut to the prompt's length.
    """

    inits: ClassVar[type[enum.Enum]] = PromptTuningInit

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        kinds = [k.value for k in self.inits]
        self.require(
            str(self.prompt_tuning_init) in kinds,
            f"prompt_tuning_init={str(self.prompt_tuning_init)!r}; allowed: {', '.join(kinds)}.",
        )
        self.prompt_tuning_init = self.inits(str(self.prompt_tuning_init))  # type: ignore[assignment]
        text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            self.require(not text or bool(getattr(self, name)), f"prompt_tuning_init='TEXT' needs {name}.")
        self.require(text or not self.tokenizer_kwargs, "tokenizer_kwargs goes with prompt_tuning_init='TEXT' alone.")

    def check_file(self, values: dict[str, Any], origin: str) -> None:
        if (values.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
            raise ConfigError(
                f"{origin} has trust_remote_code in tokenizer_kwargs, which would let the file run code of its choice. "
                "A saved prompt needs no tokenizer: take the entry out of the file."
            )

    def to_json(self) -> str:
        safe = copy.copy(self)
        safe.tokenizer_kwargs = {k: v for k, v in (self.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
        safe.tokenizer_kwargs = safe.tokenizer_kwargs or None
        return super(PromptTuningConfig, safe).to_json()


@method("prompt_tuning", PromptTuningConfig)
class PromptEmbedding(Prompt):
    """The soft prompt."""

    def __init__(self, config: PromptTuningConfig, words: nn.Module, loading: bool = False) -> None:
        super().__init__()
        tokens, dim = count(config), config.token_dim
        assert dim is not None
        self.embedding = nn.Embedding(tokens, dim)
        start: dict[str, Callable[..., Tensor]] = {
            PromptTuningInit.TEXT: text_ids,
            PromptTuningInit.SAMPLE_VOCAB: sampled_ids,
        }
        ids = start.get(config.prompt_tuning_init)
        if ids is not None and not loading:
            self.embedding.weight.data = looked_up(ids, config, words, tokens).to(torch.float32)


def count(config: PromptLearningConfig) -> int:
    """The prompt's tokens over all parts of the model (encoder and decoder)."""
    return (config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1)


def looked_up(ids: Callable[..., Tensor], config: PromptTuningConfig, words: Any, tokens: int) -> Tensor:
    """The embeddings of a start's token ids."""
    with torch.no_grad():
        return words(ids(config, words, tokens).to(words.weight.device)).detach().clone()


def sampled_ids(config: PromptTuningConfig, words: Any, tokens: int) -> Tensor:
    """Random words of the vocabulary."""
    return torch.randint(0, words.weight.shape[0], (tokens,))


def text_ids(config: PromptTuningConfig, words: Any, tokens: int) -> Tensor:
    """The text's tokens, repeated or cut to fill the prompt."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DependencyError("prompt_tuning_init='TEXT' needs transformers. pip install transformers") from error
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens.")
    return torch.tensor(ids).repeat(-(-tokens // len(ids)))[:tokens]
