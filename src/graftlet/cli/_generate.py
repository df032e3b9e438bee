# SPDX-License-Identifier: Apache-2.0
"""`graftlet generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import TextStreamer, set_seed

from ..config import PeftConfig
from ..errors import CallError
from ..train.adapter import Opened, open_adapter, summary_of
from ..train.rules import RULES
from ..train.score import stops


@dataclass(frozen=True)
class Settings:
    """How to ask."""

    max_new_tokens: int
    temperature: float
    seed: int
    adapter: bool
    system: str | None
    raw: bool


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of a file's lines; `CallError` where there is none."""
    prompts = list(given)
    if file is not None:
        try:
            prompts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise CallError(f"the prompts {str(file)!r} cannot be read: {error.strerror}.") from error
    if not prompts:
        raise CallError("there is no prompt; give one in quotes, or a file of them with --file.")
    return prompts


def generate(adapter: str, prompts: Sequence[str], settings: Settings, **where: Any) -> None:
    """Answer every prompt on standard output. Several are told apart by a line with the prompt before each answer."""
    _check(adapter)
    opened = open_adapter(adapter, report=lambda text: typer.echo(text, err=True), **where)
    for prompt in prompts:
        if len(prompts) > 1:
            typer.echo(f"» {prompt}")
        _answer(opened, prompt, settings)
        sys.stdout.flush()


def _check(adapter: str) -> None:
    """Raise `CallError` where an adapter is for a model that writes no text, with what it is used by."""
    kind, task = PeftConfig.from_pretrained(adapter).task_type, summary_of(adapter).get("recipe", {}).get("task")
    silent = {name: rules for name, rules in RULES.items() if rules.use and rules.type == kind}
    if silent:
        rules = silent.get(task) or next(iter(silent.values()))
        raise CallError(f"{adapter} is an adapter for {kind}, which writes no text; in Python, {rules.use}.")


@torch.no_grad()
def _answer(opened: Opened, prompt: str, settings: Settings) -> None:
    set_seed(settings.seed)
    tokenizer, model = opened.encoder.tokenizer, opened.model
    ids = opened.encoder.prompt(opened.messages(prompt, settings.system, settings.raw))
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature > 0 else {"do_sample": False}
    )
    inputs = torch.tensor([ids], device=model.device)
    with nullcontext() if settings.adapter else model.disable_adapter():
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=settings.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops(model, tokenizer),
            **sampling,
        )
