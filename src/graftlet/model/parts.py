# SPDX-License-Identifier: Apache-2.0
"""What the modules of `model/` ask of a model, whichever way its adapters were put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.context import Carrying, copying
from ..core.host import COMPILED, home_of, hosts
from ..core.layer import AdaptedLayer
from ..core.prompt import IGNORED
from ..core.tuner import BaseTuner
from ..errors import CallError


def root_of(model: nn.Module) -> nn.Module:
    """The model below the wrapper that `torch.compile` or a data-parallel engine puts around it."""
    while (inner := COMPILED if COMPILED in model._modules else _inner(model)) is not None:
        model = cast(nn.Module, model._modules[inner])
    return model


def near(model: nn.Module) -> str | None:
    """The GPU that a model is on, to which an adapter's file is then read directly; None where it is on none."""
    first = next(model.parameters(), None)
    return str(first.device) if first is not None and first.is_cuda else None


ENGINES = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine")
"""Classes of data-parallel engines, which keep the model that they wrap as `module`."""


def _inner(model: nn.Module) -> str | None:
    return "module" if any(kind.__name__ in ENGINES for kind in type(model).__mro__) else None


def carry_context(model: nn.Module) -> None:
    """Let what a model recomputes in its backward see the call's context: its checkpoint functions take it along."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, Carrying):
            module.__dict__["_gradient_checkpointing_func"] = Carrying(checkpoint)


@contextmanager
def with_copies(model: nn.Module) -> Iterator[None]:
    """A call of a model whose layers have copies of what learns; what it recomputes in backward sees them again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    home = home_of(model)
    if home.asked is None:
        carry_context(model)  # once: it looks at every module. Where checkpointing begins later, casts are made anew
    with copying(home):
        yield


def as_rows(value: Any) -> Tensor:
    """What a call gives row by row, as a tensor; in a list, None stands for 0."""
    return value if isinstance(value, Tensor) else torch.tensor([0 if v is None else v for v in value])


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """The adapters' configs by name: the model's own record, or what its layers hold."""
    if isinstance(model, BaseTuner):
        return model.peft_config
    record = model.__dict__.get("peft_config") or getattr(model, "peft_config", None)
    if isinstance(record, dict):
        return record
    found: dict[str, PeftConfig] = {}
    for _, host in hosts(model):
        if isinstance(host, AdaptedLayer):
            found.update(host.configs)
    return found


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels `[batch, tokens]` as a decoder's inputs: one place later, behind the start token, without ignored ones."""
    if pad_token_id is None:
        raise CallError("pad_token_id is None; it stands where a label is ignored, so the model's config needs one.")
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, pad_token_id)


def transformers_config(model: nn.Module) -> dict[str, object]:
    """A transformers model's config as a dictionary; empty where there is none."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        return config
    return config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
