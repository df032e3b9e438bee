# SPDX-License-Identifier: Apache-2.0
"""What a method beside the model is: rows that go before the input's embeddings, or keys and values for the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self


class Prompt(nn.Module):
    """What a prompt method puts before the input's embeddings. A subclass makes `embedding`, and may override the rest.

    Args:
        config: with its sizes filled in. words: the model's input embedding. loading: the tensors come from a file, so
            nothing needs to be started, and only what the file has is needed, in the shapes that it has there.

    takes: arguments of a call that are for the prompt and not for the model, such as a task's number. Those that have an
        entry a row come with one for each row that the prompt serves.
    frozen: what the names of tensors that do not learn begin with.
    """

    law: ClassVar[str] = "one"
    unmergeable: ClassVar[str | None] = "it changes no weight"
    exact_start: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    embedding: nn.Embedding

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and not name.startswith(self.frozen))
        return self

    def rows(self) -> Tensor:
        """The prompt, `[tokens, dim]`, as it goes to the file."""
        return self.embedding.weight

    def forward(self, indices: Tensor) -> Tensor:
        """The rows of these tokens of the prompt."""
        return nn.functional.embedding(indices, self.rows())

    def prompt(self, batch: int, given: Mapping[str, Any]) -> Tensor:
        """What goes before each row of a batch, `[batch, tokens, dim]`; `given` has the arguments named in `takes`."""
        return self.rows().expand(batch, -1, -1)

    def labels(self, like: Tensor, tokens: int) -> Tensor:
        """The labels of the prompt's own tokens, `[batch, tokens]`, before a call's; no loss looks at these."""
        return like.new_full((like.shape[0], tokens), IGNORED)

    def finish(self, output: Any, given: Mapping[str, Any]) -> Any:
        """The output of a call with this prompt; a method with a loss of its own puts it there."""
        return output

    def saved(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        return {ROWS: self.rows()}

    def assign(self, given: Mapping[str, Tensor]) -> None:
        """Take over a file's tensors, as many as are given, of the shapes that `saved` has.

        Raises `ConfigError` where the prompt is made by a network, which no file has.
        """
        if ROWS not in given:
            return
        if self.rows() is not self.embedding.weight:
            raise ConfigError(
                f"this prompt trains through a network ({type(self).__name__}), which a file does not have: load the "
                "file as an adapter of its own; it goes on training without one."
            )
        self.embedding.weight.copy_(given[ROWS])


class Cache(Prompt):
    """Keys and values that a prompt method puts into the cache: `rows` is `[tokens, layers * 2 * heads * size]`."""

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take these rows over. Raises `ConfigError` for another shape, or where a network makes the rows."""
        own, given = self.rows().shape, prompt_embeddings.shape
        if own != given:
            raise ConfigError(f"prompt_embeddings is {list(given)}; this adapter holds {list(own)}.")
        self.assign({ROWS: prompt_embeddings})


ROWS = "prompt_embeddings"
"""What a prompt's rows are called in the file."""

IGNORED = -100
"""The label that no loss looks at."""

CACHES = ("cache", "past_key_values")
"""What the models of transformers call their cache; 5.x renames it."""
