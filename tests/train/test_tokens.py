# SPDX-License-Identifier: Apache-2.0
"""Labels stand on what the assistant says, and on nothing else."""

from __future__ import annotations

import pytest

from graftlet.errors import ConfigError
from graftlet.train.data import Example
from graftlet.train.tokens import IGNORED, Encoded, Encoder

from . import tiny

REWRITING = tiny.TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content']|upper if m['role'] == 'assistant' and not loop.last else m['content'] }}"
)


def chat(*contents: str) -> Example:
    roles = ["user", "assistant"] * len(contents)
    return Example(tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False)))


def learnt(encoder: Encoder, row: Encoded) -> str:
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    return encoder.tokenizer.decode([t for t in row.labels if t != IGNORED])


def test_one_turn() -> None:
    encoder = Encoder(tiny.tokenizer())
    (row,) = encoder(chat("one plus one?", "two"))
    assert encoder.tokenizer.decode(row.input_ids) == "<|user|>one plus one?<|end|>\n<|assistant|>two<|end|>\n"
    assert learnt(encoder, row) == "two<|end|>"
    assert row.prompt == encoder.prompt(chat("one plus one?", "two").messages[:-1])


def test_every_answer_of_a_conversation() -> None:
    encoder = Encoder(tiny.tokenizer())
    (row,) = encoder(chat("a", "first", "b", "second"))
    assert learnt(encoder, row) == "first<|end|>second<|end|>"
    assert encoder.tokenizer.decode(row.prompt).endswith("<|user|>b<|end|>\n<|assistant|>")


def test_a_template_that_rewrites_earlier_turns_gives_a_row_an_answer() -> None:
    encoder = Encoder(tiny.tokenizer(REWRITING))
    rows = encoder(chat("a", "first", "b", "second"))
    assert [learnt(encoder, r) for r in rows] == ["first<|end|>", "second<|end|>"]
    assert "FIRST" in encoder.tokenizer.decode(rows[1].input_ids)


def test_a_template_that_asks_otherwise_than_it_tells_is_refused() -> None:
    template = tiny.TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|>well, {% endif")
    with pytest.raises(ConfigError, match="the answer's tokens cannot be told"):
        Encoder(tiny.tokenizer(template))(chat("a", "b"))


def test_a_template_that_raises_is_named() -> None:
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match="no system role"):
        Encoder(tiny.tokenizer(template))(chat("a", "b"))


def test_without_a_template() -> None:
    encoder = Encoder(tiny.tokenizer(None))
    (row,) = encoder(chat("2+2=", "4"))
    assert encoder.tokenizer.decode(row.input_ids) == "2+2=4<|end|>"
    assert learnt(encoder, row) == "4<|end|>"
    with pytest.raises(ConfigError, match="needs a chat template"):
        encoder(chat("a", "b", "c", "d"))
    with pytest.raises(ConfigError, match="has no chat template"):
        Encoder(tiny.tokenizer(None), chat=True)


def test_an_empty_answer_still_ends() -> None:
    encoder = Encoder(tiny.tokenizer())
    (row,) = encoder(chat("a", ""))
    assert learnt(encoder, row) == "<|end|>"
