# SPDX-License-Identifier: Apache-2.0
"""What is measured on held-out examples: the likeliest choice, or whether a generated answer is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, listing
from .data import Example
from .recipe import EvaluationTable
from .tokens import Encoder

Judge = Callable[[str, Example], bool]


@dataclass(frozen=True)
class Score:
    """The model's answer to each example, and which were right."""

    answers: tuple[str, ...]
    right: tuple[bool, ...]

    @property
    def value(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.right)

    def same_as(self, other: Score) -> int:
        """How many answers are the same as in another score."""
        return sum(a == b for a, b in zip(self.answers, other.answers, strict=True))


@dataclass(frozen=True)
class Estimates(Score):
    """Amounts, none of which is right or wrong. off: the mean square of how far they are from the right ones."""

    off: float = 0.0

    @property
    def value(self) -> float:
        """The mean squared error."""
        return self.off


WORDS = {
    "choice": "accuracy",
    "squared_error": "mean squared error",
    "ranked": "pairs ranked right",
    "recall": "recall at 1",
}
"""Metrics that are called otherwise than in a recipe."""


def named(metric: str) -> str:
    """A metric in words."""
    return WORDS.get(metric, metric.replace("_", " "))


def shown(metric: str, value: float) -> str:
    """A metric's value as it is written: shares in per cent."""
    return f"{value:.4f}" if metric == "squared_error" else f"{value:.1%}"


class Scorer:
    """Puts the same questions to any model. Made once, so that every measurement is of the same examples.

    Raises `ConfigError` where a right answer is not among the choices, or choices cannot be told apart by their first
    token or are not in the vocabulary.
    """

    def __init__(self, encoder: Encoder, examples: Sequence[Example], table: EvaluationTable) -> None:
        self.encoder, self.examples, self.table = encoder, examples, table
        self.prompts = [encoder.prompt(e.messages[:-1]) for e in examples]
        self.choices = _choice_tokens(encoder, examples, table.choices) if table.metric == "choice" else {}

    def __call__(self, model: Any) -> Score:
        """The score of a model, which is put into evaluation for the time being."""
        if self.table.metric == "choice":
            answers = choose(
                model, self.prompts, self.choices, self.encoder.tokenizer.pad_token_id, self.table.batch_size
            )
            return Score(tuple(answers), tuple(a == e.answer for a, e in zip(answers, self.examples, strict=True)))
        answers = self.generate(model, self.prompts)
        judge = JUDGES[self.table.metric]
        return Score(tuple(answers), tuple(judge(a, e) for a, e in zip(answers, self.examples, strict=True)))

    def samples(self, model: Any, count: int) -> list[str]:
        """What the model says to the first `count` questions, by greedy generation."""
        return self.generate(model, self.prompts[:count])

    def generate(self, model: Any, prompts: Sequence[list[int]]) -> list[str]:
        """The greedy answers to prompts."""
        return generate(model, self.encoder.tokenizer, prompts, self.table.batch_size, self.table.max_new_tokens)


def _choice_tokens(encoder: Encoder, examples: Sequence[Example], choices: Sequence[str]) -> dict[str, int]:
    if not examples:
        return {}
    strange = sorted({e.answer for e in examples} - set(choices))
    if strange:
        raise ConfigError(f"evaluation.choices = {list(choices)}: the held-out answers also have {listing(strange)}.")
    tokens = {c: encoder.first_token(examples[0], c) for c in choices}
    unknown = [c for c, t in tokens.items() if t == encoder.tokenizer.unk_token_id]
    if unknown:
        raise ConfigError(f"evaluation.choices: {listing(unknown)} begins with no token of the model's vocabulary.")
    if len(set(tokens.values())) < len(tokens):
        raise ConfigError(
            f"evaluation.choices: some of {listing(choices)} begin with the same token; choose other words."
        )
    return tokens


def in_batches(prompts: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Indices, the longest prompts first: little is padding, and memory runs out at once or never."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded_left(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@torch.no_grad()
def choose(model: Any, prompts: Sequence[list[int]], choices: dict[str, int], pad: int, size: int) -> list[str]:
    """For each prompt the choice whose token is likeliest next. `choices`: answer to token id."""
    names, tokens = list(choices), torch.tensor(list(choices.values()), device=model.device)
    answers = [""] * len(prompts)
    with evaluating(model):
        for rows in in_batches(prompts, size):
            ids, mask = _padded_left([prompts[i] for i in rows], pad, model.device)
            positions = {} if _learns_prompt(model) else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, **positions)
            best = out.logits[:, -1].float().index_select(1, tokens).argmax(1).tolist()
            for i, choice in zip(rows, best, strict=True):
                answers[i] = names[choice]
    return answers


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], size: int, new_tokens: int) -> list[str]:
    """For each prompt the model's greedy answer of at most `new_tokens` tokens."""
    answers = [""] * len(prompts)
    with evaluating(model):
        for rows in in_batches(prompts, size):
            ids, mask = _padded_left([prompts[i] for i in rows], tokenizer.pad_token_id, model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stops(model, tokenizer),
            )
            told = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for i, answer in zip(rows, told, strict=True):
                answers[i] = answer.strip()
    return answers


def stops(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's own generation settings add."""
    own = model.generation_config.eos_token_id
    return sorted({t for t in (*_listed(own), tokenizer.eos_token_id) if t is not None})


class evaluating:
    """No dropout, and no memory of a training state, while it lasts."""

    def __init__(self, model: Any) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.training)


def _learns_prompt(model: Any) -> bool:
    config = getattr(model, "active_peft_config", None)
    return bool(config is not None and config.is_prompt_learning)


def _exact(answer: str, example: Example) -> bool:
    return answer.split() == example.answer.split()


def _json(answer: str, example: Example) -> bool:
    return _parsed(answer) is not None and _parsed(answer) == _parsed(example.answer)


def _call(answer: str, example: Example) -> bool:
    """The right functions, every argument among the values allowed, none missing that may not be left out."""
    said = _parsed(answer)
    calls = said if isinstance(said, list) else [said]
    gold = example.gold or []
    return len(calls) == len(gold) and all(_call_fits(c, g) for c, g in zip(calls, gold, strict=True))


def _call_fits(said: Any, gold: dict[str, dict[str, list[Any]]]) -> bool:
    ((name, allowed),) = gold.items()
    if not isinstance(said, dict) or said.get("name") != name or not isinstance(said.get("arguments"), dict):
        return False
    given = said["arguments"]
    left_out = allowed.keys() - given.keys()
    return (
        given.keys() <= allowed.keys()
        and all("" in allowed[k] for k in left_out)
        and all(any(_same(given[k], value) for value in allowed[k]) for k in given)
    )


def _same(said: Any, gold: Any) -> bool:
    if isinstance(gold, dict) and isinstance(
        said, dict
    ):  # the leaves of a nested gold value are lists of what is allowed
        return said.keys() <= gold.keys() and all(any(_same(said[k], v) for v in _listed(gold[k])) for k in said)
    if isinstance(gold, str) and isinstance(said, str):
        return gold.casefold().split() == said.casefold().split()
    return said == gold and isinstance(said, bool) == isinstance(gold, bool)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


JUDGES: dict[str, Judge] = {"exact_match": _exact, "json_match": _json, "function_call": _call}
"""Metrics of generated answers, by their name in a recipe."""
