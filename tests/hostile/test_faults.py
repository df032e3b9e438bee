# SPDX-License-Identifier: Apache-2.0
"""Whatever fails in an operation, and at whichever step, the model is as it was.

An operation is run once to count its tensor operations; then again and again, failing at one of them each time.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graftlet
from graftlet.core.host import hosts
from graftlet.serve.hotswap import hotswap_adapter
from graftlet.testing import laws
from graftlet.testing.case import Case
from graftlet.testing.laws import LAWS
from tests.laws.cases import cases
from tests.model.models import Net, adapted, facts, llama, load, logits, lora, same, save


class Broken(RuntimeError):
    """What is made to happen: as a device that is out of memory."""


class Faults(TorchDispatchMode):
    """Counts the tensor operations of what is run under it, and fails at one of them."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise Broken(f"at {self.count}: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Operation = tuple[Callable[[], Any], Callable[[Any], object]]
"""How a model is made, always the same, and what is then done to it."""


def fails_at_each_step(make: Callable[[], Any], act: Callable[[Any], object], steps: int) -> None:
    """An act fails at its first, second, ... tensor operation (at `steps` of them, evenly spread): nothing has changed.

    After the last failure it is done, and succeeds.
    """
    torch.manual_seed(5)
    with quiet(), Faults() as all_of_it:
        act(make_outside(make))
    total = all_of_it.count
    places = (
        sorted({1 + i * (total - 1) // max(1, steps - 1) for i in range(steps)})
        if total > steps
        else range(1, total + 1)
    )
    model = make_outside(make)
    before, state = facts(model), condition(model)
    for at in places:
        torch.manual_seed(5)
        with quiet(), pytest.raises(Exception) as raised, Faults(at):
            act(model)
        chain = [raised.value, raised.value.__cause__, raised.value.__context__]
        assert any(isinstance(e, Broken) for e in chain), raised.value
        assert same(before, model), f"changed by failing at {at} of {total}: {raised.value}"
        assert condition(model) == state, f"changed by failing at {at} of {total}: {raised.value}"
    torch.manual_seed(5)
    with quiet():
        act(model)


def make_outside(make: Callable[[], Any]) -> Any:
    """A model made where nothing fails or is counted."""
    with torch.utils._python_dispatch._disable_current_modes(), quiet():
        return make()


def condition(model: nn.Module) -> Any:
    """What else must stay: which adapters there are, act, are merged and learn, layer by layer."""
    record = getattr(model, "peft_config", None) or {}
    layers = [(n, h.adapters, h.active_adapters, list(h.merged_adapters), sorted(h._learning)) for n, h in hosts(model)]
    return list(record), list(getattr(model, "active_adapters", [])) if record else [], layers


def two() -> Any:
    model = adapted(llama(), lora(init_lora_weights=False))
    model.add_adapter("b", lora(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    return model


def merged() -> Any:
    model = two()
    model.merge_adapter(["default"])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save(
        adapted(llama(), lora(init_lora_weights=False, modules_to_save=["lm_head"], trainable_token_indices=[1])), path
    )
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("plain")
    save(adapted(llama(), lora(init_lora_weights=False)), path)
    return path


PROMPT = functools.partial(graftlet.PromptTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM")

ACTS: dict[str, Operation] = {
    "wrap": (llama, lambda m: graftlet.get_peft_model(m, lora(bias="all"))),
    "inject": (llama, lambda m: graftlet.inject_adapter_in_model(lora(modules_to_save=["lm_head"]), m)),
    "wrap, PiSSA": (llama, lambda m: graftlet.get_peft_model(m, lora(init_lora_weights="pissa"))),
    "wrap, DoRA": (llama, lambda m: graftlet.get_peft_model(m, lora(use_dora=True))),
    "wrap, tokens": (llama, lambda m: graftlet.get_peft_model(m, lora(trainable_token_indices=[1, 2]))),
    "wrap, replicated": (llama, lambda m: graftlet.get_peft_model(m, lora(layer_replication=[[0, 3], [1, 3]]))),
    "wrap a plain module": (Net, lambda m: graftlet.get_peft_model(m, lora(target_modules=["a"], modules_to_save=["b"]))),
    "add": (two, lambda m: m.add_adapter("c", lora(modules_to_save=["lm_head"]))),
    "add, another method": (two, lambda m: m.add_adapter("c", graftlet.VeraConfig(r=4, target_modules=["q_proj"]))),
    "merge": (two, lambda m: m.merge_adapter(["default", "b"])),
    "merge another": (merged, lambda m: m.merge_adapter(["b"])),
    "merge for good": (two, lambda m: m.merge_and_unload()),
    "combine": (two, lambda m: m.add_weighted_adapter(["default", "b"], [0.3, 0.7], "c", "exact")),
    "combine by SVD": (two, lambda m: m.add_weighted_adapter(["default", "b"], [0.3, 0.7], "c", "svd")),
    "unload": (two, lambda m: m.unload()),
    "delete": (two, lambda m: m.delete_adapter("default")),
    "set": (two, lambda m: m.set_adapter("b")),
    "rename": (two, lambda m: m.rename_adapter("b", "c")),
    "prompt": (llama, lambda m: graftlet.get_peft_model(m, PROMPT())),
}  # fmt: skip


def needs_steps(act: Operation) -> bool:
    """Whether an operation runs any tensor operation that could fail."""
    with quiet(), Faults() as counted:
        act[1](make_outside(act[0]))
    return counted.count > 0


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_an_operation_that_fails_leaves_the_model_as_it_was(act: Operation) -> None:
    if needs_steps(act):
        fails_at_each_step(*act, steps=25)


def test_a_load_that_fails_leaves_the_model_as_it_was(folder: Path, plain: Path) -> None:
    fails_at_each_step(llama, lambda m: graftlet.PeftModel.from_pretrained(m, folder), steps=40)
    fails_at_each_step(two, lambda m: m.load_adapter(folder, "c"), steps=40)


@pytest.mark.parametrize("state", [two, merged])
def test_unmerging_that_fails_can_be_done_again(state: Callable[[], Any]) -> None:
    """What is in the weights is told by what the layers say is merged, and doing it again brings the bits back."""
    wanted = {k: t.clone() for k, t in two().state_dict().items()}
    for at in range(1, 12):
        model = merged()
        with quiet(), pytest.raises(Broken), Faults(at):
            model.unmerge_adapter()
        with quiet():
            model.unmerge_adapter()
        assert all(torch.equal(t, wanted[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("rank", [1, 2, 5], ids=["lower", "same", "higher"])
def test_a_swap_that_fails_changes_nothing(rank: int, tmp_path: Path) -> None:
    save(adapted(llama(), lora(r=rank, init_lora_weights=False)), tmp_path)

    def make() -> Any:
        return perturbed(adapted(llama(), lora(r=2)))

    torch.manual_seed(3)
    with quiet(), Faults() as counted:
        hotswap_adapter(make_outside(make), str(tmp_path), "default")
    torch.manual_seed(3)
    model = make()
    before, parameters, y = facts(model), list(model.parameters()), logits(model)
    for at in [*range(1, counted.count, max(1, counted.count // 25)), *range(counted.count - 12, counted.count + 1)]:
        with quiet(), pytest.raises(Exception), Faults(at):  # noqa: B017
            hotswap_adapter(model, str(tmp_path), "default")
        assert same(before, model), at
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True)), at
        assert torch.equal(logits(model), y), at
    with quiet():
        hotswap_adapter(model, str(tmp_path), "default")
    wanted = load(llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(wanted))


QUICK = ("LORA", "PROMPT_TUNING", "SHADOW", "IA3", "VERA", "OFT", "BEFT", "SHIRA", "ADALORA", "LN_TUNING")
"""A few methods of each family; the others are slow."""


def rows() -> Iterator[Any]:
    for one in cases():
        kind = "decoder" if one.whole else "embedding" if one.entry.name == "TRAINABLE_TOKENS" else "linear"
        if one.first and one.bench.name == kind:
            yield pytest.param(one, id=one.entry.name, marks=() if one.entry.name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("one", list(rows()))
def test_every_method_leaves_the_model_as_it_was(one: Case, tmp_path: Path) -> None:
    def wrapped() -> Any:
        torch.manual_seed(3)
        return perturbed(graftlet.get_peft_model(one.bench.model(torch.float32), one.config()).eval())

    def base() -> Any:
        return one.bench.model(torch.float32)

    fails_at_each_step(base, lambda m: graftlet.get_peft_model(m, one.config()), steps=12)
    save(wrapped(), tmp_path)
    fails_at_each_step(base, lambda m: graftlet.PeftModel.from_pretrained(m, tmp_path), steps=12)
    if one.mergeable and LAWS[laws.merged_equals_forward_and_unmerging_restores_the_bits](one):
        fails_at_each_step(wrapped, lambda m: m.merge_adapter(), steps=12)


@torch.no_grad()
def perturbed(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
