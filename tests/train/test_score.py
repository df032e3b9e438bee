# SPDX-License-Identifier: Apache-2.0
"""Metrics: batching changes no answer, and judges accept what is right and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graftlet.train.data import Example
from graftlet.train.score import JUDGES, choose, generate

from . import tiny


def example(answer: str, gold: Any = None) -> Example:
    return Example(({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}), gold)


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3], [5, 8, 9, 7]]


def test_choices_are_those_of_each_prompt_alone() -> None:
    model, choices = tiny.model(), {"a": 17, "b": 40, "c": 99}
    with torch.no_grad():
        alone = [model(torch.tensor([p])).logits[0, -1, [17, 40, 99]].argmax().item() for p in PROMPTS]
    for size in (1, 3, 8):
        assert choose(model, PROMPTS, choices, 0, size) == ["abc"[i] for i in alone]
    assert model.training


def test_generated_answers_are_those_of_each_prompt_alone() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    alone = [generate(model, tokenizer, [p], 1, 5)[0] for p in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, 4, 5) == alone


GOLD = [{"area": {"base": [10], "height": [5, 5.5], "unit": ["cm", ""]}}]


@pytest.mark.parametrize(
    ("metric", "answer", "right", "gold", "expected"),
    [
        ("exact_match", " two\nwords ", "two words", None, True),
        ("exact_match", "Two words", "two words", None, False),
        ("json_match", '{"b": 1, "a": [2]}', '{"a":[2],"b":1}', None, True),
        ("json_match", "{", "{", None, False),
        ("function_call", {"name": "area", "arguments": {"base": 10, "height": 5.5}}, "", GOLD, True),
        ("function_call", {"name": "area", "arguments": {"base": 10, "height": 5, "unit": "CM"}}, "", GOLD, True),
        ("function_call", [{"name": "area", "arguments": {"base": 10, "height": 5}}], "", GOLD, True),
        ("function_call", {"name": "area", "arguments": {"base": 10}}, "", GOLD, False),
        ("function_call", {"name": "area", "arguments": {"base": 10, "height": 6}}, "", GOLD, False),
        ("function_call", {"name": "area", "arguments": {"base": 10, "height": 5, "x": 1}}, "", GOLD, False),
        ("function_call", {"name": "volume", "arguments": {"base": 10, "height": 5}}, "", GOLD, False),
        ("function_call", {"name": "f", "arguments": {"on": 1}}, "", [{"f": {"on": [True]}}], False),
        ("function_call", {"name": "f", "arguments": {"o": {"k": 2}}}, "", [{"f": {"o": [{"k": [1, 2]}]}}], True),
        ("function_call", "no json", "", GOLD, False),
        ("function_call", [], "", GOLD, False),
    ],
)
def test_judges(metric: str, answer: Any, right: str, gold: Any, expected: bool) -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    assert JUDGES[metric](text, example(right, gold)) is expected
