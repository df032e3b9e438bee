# SPDX-License-Identifier: Apache-2.0
"""P-tuning: a soft prompt made by a small network while it trains (arXiv 2103.10385).   P = MLP(E) or MLP(LSTM(E))

E `[tokens * submodules, dim]`. The file has P alone, so that a loaded prompt needs no network.
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from ...config import PromptLearningConfig
from ...core.kernel import without_autocast
from ...core.prompt import Prompt
from ...registry import method
from .prompt_tuning import count


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"

    __str__ = str.__str__


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning.

    Args:
        num_virtual_tokens: the prompt's length.
        encoder_reparameterization_type: MLP, three layers; LSTM, in both directions, with an MLP of two layers on it.
        encoder_hidden_size: the network's width (None: the embeddings' size).
        encoder_num_layers, encoder_dropout: the LSTM's layers, and the dropout between them.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def check(self) -> None:
        given, kinds = str(self.encoder_reparameterization_type), [k.value for k in PromptEncoderReparameterizationType]
        allowed = ", ".join(kinds)
        self.require(given in kinds, f"encoder_reparameterization_type={given!r}; allowed: {allowed}.")
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(given)
        self.require(self.encoder_num_layers > 0, f"encoder_num_layers={self.encoder_num_layers}; one at least.")
        self.require(0 <= self.encoder_dropout < 1, f"encoder_dropout={self.encoder_dropout}; 0 to below 1.")
        hidden = self.encoder_hidden_size
        self.require(hidden is None or hidden > 0, f"encoder_hidden_size={hidden}; a positive number is needed.")


@method("p_tuning", PromptEncoderConfig)
class PromptEncoder(Prompt):
    """The prompt, and the network that makes it while it trains."""

    def __init__(self, config: PromptEncoderConfig, words: nn.Module, loading: bool = False) -> None:
        super().__init__()
        dim = config.token_dim
        assert dim is not None
        hidden = config.encoder_hidden_size or dim
        self.embedding = nn.Embedding(count(config), dim)
        self.lstm_head = self.mlp_head = None
        if loading:
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                dim, hidden, config.encoder_num_layers, batch_first=True, dropout=config.encoder_dropout,
                bidirectional=True,
            )  # fmt: skip
            self.mlp_head = layers(2 * hidden, 2 * hidden, dim)
        else:
            self.mlp_head = layers(dim, hidden, hidden, dim)

    def rows(self) -> Tensor:
        made = self.embedding.weight
        if self.lstm_head is not None:
            with without_autocast(made.device):  # not every processor has it in half precision
                made = self.lstm_head(made.unsqueeze(0))[0].squeeze(0)
        return made if self.mlp_head is None else self.mlp_head(made)

    def saved(self) -> dict[str, Tensor]:
        before = self.training
        self.eval()  # a file has no dropout in it
        try:
            return super().saved()
        finally:
            self.train(before)


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers from size to size, with a ReLU between two."""
    made = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*made[:-1])
