# SPDX-License-Identifier: Apache-2.0
"""Prompt methods beside a model: their encoders, what they put into a call, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import PeftConfig
    from .peft_model import PeftModel


def attach(model: PeftModel, name: str, config: PeftConfig) -> None:
    """Make an adapter's encoder and put it into `model.prompt_encoder`."""
    raise NotImplementedError


def detach(model: PeftModel, name: str) -> None:
    """Forget an adapter."""
    raise NotImplementedError


def activate(model: PeftModel, name: str, inference_mode: bool) -> None:
    """Make an adapter the active one."""
    raise NotImplementedError


def set_requires_grad(model: PeftModel, names: list[str], requires_grad: bool) -> None:
    """Let adapters learn, or freeze them."""
    raise NotImplementedError


@contextmanager
def disabled(model: PeftModel) -> Iterator[None]:
    """The base model alone, until the block ends."""
    raise NotImplementedError
    yield


def call(model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A forward with the active prompt in it."""
    raise NotImplementedError


def generate(model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Generation with the active prompt in it."""
    raise NotImplementedError


def prompt(model: PeftModel, batch: int, task_ids: Tensor | None, max_cache_len: int | None) -> Any:
    """What the active method puts before each row."""
    raise NotImplementedError


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors, by their key in the file."""
    raise NotImplementedError


def load(model: nn.Module, name: str, given: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Put tensors into an adapter; returns what is missing and what does not belong."""
    raise NotImplementedError


def misfit(
    model: nn.Module, name: str, given: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str], list[str]]:
    """How a file's tensors fit: missing, unexpected, misshaped, mistyped (see `core.state.Fit`)."""
    raise NotImplementedError
