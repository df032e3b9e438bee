# SPDX-License-Identifier: Apache-2.0
"""A training step on tensors without data, and what it took."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.kernel import rehearsal
from ...errors import ConfigError, GraftletError
from ...train.optimisers import NAMES, by_name
from .attention import Operations
from .ledger import Ledger, parts_of
from .setup import Setup
from .skeleton import quiet

BYTE_STATES = 2
"""Numbers of one byte that an 8-bit AdamW keeps a parameter."""


def rehearse(model: Any, base: list[Tensor], setup: Setup) -> Ledger:
    """Take a step as it is once an optimiser has its state: forward, backward, update. Raises `ConfigError` where the
    model asks for numbers on the way.
    """
    vocabulary = int(getattr(setup.config.get_text_config(), "vocab_size", 0) or 0)
    routed = any("expert" in name for name in setup.config.to_dict())  # how many tokens each gets is not known
    book = Ledger(kind=setup.device.kind, wide=vocabulary, says=not setup.padding, whole=not routed)
    with quiet(), ExitStack() as stack:
        for mode in (rehearsal(setup.device.kind), Operations(setup.device.kind, book), book):
            stack.enter_context(mode)
        book.note_all(base, "weights")
        book.note_all(parts_of(model), "adapters")
        learning = [p for p in model.parameters() if p.requires_grad]
        optimiser = _started(model, learning, setup, book)
        try:
            _step(model, learning, setup, book)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, GraftletError):
                raise
            raise _cannot(setup, error) from error
        with book.during("optimiser"):
            _update(optimiser, learning)
    return book


def _cannot(setup: Setup, error: Exception) -> ConfigError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    what = type(setup.config).__name__.removesuffix("Config")
    return ConfigError(
        f"estimate: a step of a {what} model depends on the numbers that go through it, as of a router of experts, or "
        f"cannot run without a device: {said}"
    )


def _step(model: Any, learning: list[nn.Parameter], setup: Setup, book: Ledger) -> None:
    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        book.note(parameter.grad, "gradients")

    hooks = [p.register_post_accumulate_grad_hook(note) for p in learning]
    for _ in range(min(setup.accumulation, 2)):  # the second finds the gradients of the first
        inputs = _inputs(model, setup)
        with book.during("forward"):
            loss = _loss(model(**inputs))
        with book.during("backward"):
            backward(loss)
        del loss, inputs
    for hook in hooks:
        hook.remove()


def _inputs(model: nn.Module, setup: Setup) -> dict[str, Tensor]:
    size = setup.batch, setup.sequence
    ids = torch.zeros(size, dtype=torch.long, device="meta")
    found = {"input_ids": ids}
    if setup.padding:
        found["attention_mask"] = torch.ones(size, dtype=torch.long, device="meta")
    if setup.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
        found["labels"] = torch.zeros(size, dtype=torch.long, device="meta")
    elif setup.task == "SEQ_CLS":
        found["labels"] = torch.zeros(setup.batch, dtype=torch.long, device="meta")
    elif setup.task == "QUESTION_ANS":
        for name in ("start_positions", "end_positions"):
            found[name] = torch.zeros(setup.batch, dtype=torch.long, device="meta")
    if getattr(getattr(model, "active_peft_config", None), "num_tasks", None):
        found["task_ids"] = torch.zeros(setup.batch, dtype=torch.long, device="meta")
    return found


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    return output[0].float().mean() if loss is None else loss


def backward(loss: Tensor) -> None:
    """`loss.backward()`, without leaving the modes that are on: checkpointing runs forwards again in it."""
    engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
    one = torch.ones_like(loss)
    engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


# the optimiser


def _started(model: nn.Module, learning: list[nn.Parameter], setup: Setup, book: Ledger) -> Optimizer | None:
    """The optimiser, with the state that it has from its first step on."""
    if not learning:
        raise ConfigError("estimate: nothing in the model learns.")
    optimiser = _optimiser(model, learning, setup)
    if optimiser is None:
        count = sum(p.numel() for p in learning)
        model._held_state = torch.empty(count * BYTE_STATES, dtype=torch.uint8, device="meta")  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        book.note(model._held_state, "optimiser")  # pyright: ignore[reportArgumentType]
        return None
    for parameter in learning:
        parameter.grad = torch.empty_like(parameter)
    with book.during("start"):
        optimiser.step()
    for state in optimiser.state.values():
        book.note_all([t for t in state.values() if isinstance(t, Tensor)], "optimiser")
    optimiser.zero_grad(set_to_none=True)
    return optimiser


def _optimiser(model: nn.Module, learning: list[nn.Parameter], setup: Setup) -> Optimizer | None:
    name, many = setup.optimiser, setup.device.kind == "cuda"
    if name in NAMES:
        return by_name(name, model, 1e-4, 0.0, dict(setup.optimiser_options))
    if name == "adamw_8bit":
        return None
    if name == "sgd":
        return torch.optim.SGD(learning, 1e-4, foreach=many)
    if name == "adafactor":
        return torch.optim.Adafactor(learning, foreach=False)
    return torch.optim.AdamW(learning, foreach=many and name != "adamw_fused")


def _update(optimiser: Optimizer | None, learning: list[nn.Parameter]) -> None:
    if optimiser is not None:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    for parameter in learning:
        parameter.grad = None
