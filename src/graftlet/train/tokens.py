# SPDX-License-Identifier: Apache-2.0
"""From a conversation to token ids, with labels on what the assistant says and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .data import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that the loss does not look at."""


@dataclass(frozen=True)
class Encoded:
    """One row of tokens: `labels` is `input_ids` where the assistant speaks, and `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> list[int]:
        """The ids before the last answer: what the model is given when it is asked."""
        end = len(self.labels)
        while end and self.labels[end - 1] == IGNORED:
            end -= 1
        while end and self.labels[end - 1] != IGNORED:
            end -= 1
        return self.input_ids[:end]


class Encoder:
    """Turns examples into tokens with a model's chat template, or plainly as prompt, answer, end where `chat` is off.

    Args:
        tokenizer: a transformers tokenizer.
        chat: whether its chat template is used; None: where it has one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> None:
        self.tokenizer: Any = tokenizer
        self.chat = bool(self.tokenizer.chat_template) if chat is None else chat
        if self.chat and not self.tokenizer.chat_template:
            raise ConfigError("data.chat = true, but the tokenizer has no chat template; set model.chat_template.")
        self._special = set(self.tokenizer.all_special_ids)

    def __call__(self, example: Example) -> list[Encoded]:
        """The rows of one example: one, or one an answer where the template rewrites earlier turns later on."""
        if not self.chat:
            return [self._plain(example)]
        messages = example.messages
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        whole = self.ids(messages)
        spans = [(self.ids(messages[:i], ask=True), self.ids(messages[: i + 1])) for i in turns]
        if all(_begins(whole, asked) and _begins(whole, told) for asked, told in spans):
            return [self._labelled(whole, [(len(asked), len(told)) for asked, told in spans])]
        return [self._turn(messages[: i + 1]) for i in turns]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a question, ready for the model to answer."""
        return self.ids(messages, ask=True) if self.chat else self._plain_prompt(messages)

    def first_token(self, example: Example, answer: str) -> int:
        """The id of the first token of `answer`, in the place where the example's own answer stands."""
        row = self(Example((*example.messages[:-1], {"role": "assistant", "content": answer})))[-1]
        return row.input_ids[len(row.prompt)]

    def text(self, messages: Sequence[Message], ask: bool = False) -> str:
        """A conversation in the words of the chat template; with `ask`, up to where the assistant begins."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template may raise anything: it is a program
            raise ConfigError(f"the chat template refuses {str(list(messages))[:200]}: {error}") from error

    def ids(self, messages: Sequence[Message], ask: bool = False) -> list[int]:
        """The token ids of `text`."""
        return self._tokens(self.text(messages, ask))

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turn(self, messages: Sequence[Message]) -> Encoded:
        """The last answer alone, after everything before it as the model sees it when asked."""
        asked, told = self.text(messages[:-1], ask=True), self.text(messages)
        if not told.startswith(asked):
            raise ConfigError(
                "the chat template shows an answer otherwise than the place where it asks for one; "
                "the answer's tokens cannot be told. Set model.chat_template to a template without that."
            )
        before = self._tokens(asked)
        row = self._tokens(told)
        if not _begins(row, before):  # the tokenizer joins across the border: what was asked stays as it was asked
            row = before + self._tokens(told[len(asked) :])
        return self._labelled(row, [(len(before), len(row))])

    def _labelled(self, row: list[int], spans: list[tuple[int, int]]) -> Encoded:
        labels = [IGNORED] * len(row)
        for start, end in spans:
            end = self._end(row, start, end)
            labels[start:end] = row[start:end]
        return Encoded(row, labels)

    def _end(self, row: list[int], start: int, end: int) -> int:
        """Without the blanks that a template writes after the token that ends an answer."""
        last = max((i for i in range(start, end) if row[i] in self._special), default=end - 1) + 1
        return last if not self.tokenizer.decode(row[last:end]).strip() else end

    def _plain_prompt(self, messages: Sequence[Message]) -> list[int]:
        return list(self.tokenizer("\n".join(m["content"] for m in messages))["input_ids"])

    def _plain(self, example: Example) -> Encoded:
        if any(m["role"] == "assistant" for m in example.messages[:-1]):
            raise ConfigError("a conversation of several answers needs a chat template; this model has none.")
        before = self._plain_prompt(example.messages[:-1])
        eos = self.tokenizer.eos_token_id
        if eos is not None and before[-1:] == [eos]:  # some tokenizers end every text
            before = before[:-1]
        answer = self._tokens(example.answer) + ([] if eos is None else [eos])
        return Encoded(before + answer, [IGNORED] * len(before) + answer)


def _begins(row: list[int], start: list[int]) -> bool:
    return row[: len(start)] == start
