# SPDX-License-Identifier: Apache-2.0
"""What learns is cast once a call, in one step: the same bits, whatever is written between calls and in them."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlet import LoraConfig, PeftModel, get_peft_model
from graftlet.core import copies
from graftlet.core.host import home_of
from graftlet.core.kernel import SWITCH, kernels
from graftlet.kernels import lowrank
from tests.kernels.stacked import Stack, stepped

LAYERS = 4
FIRST = 4
TENSORS = 2 * 3 * LAYERS
TOGETHER = TENSORS - 2 * (FIRST - 1)


class Block(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for bias in (True, False, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x).sigmoid() + self.v(x)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are served too."""
    monkeypatch.setattr(copies, "FIRST", FIRST)


def made(again: bool = False, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 8, "target_modules": ["q", "k", "v"], "init_lora_weights": False, **options}
    stack = Stack((Block() for _ in range(LAYERS)), again).to(torch.bfloat16)
    return get_peft_model(stack, LoraConfig(**options)).train()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors were cast in each step that casts several."""
    found: list[int] = []
    plain = torch._foreach_copy_

    def copying(into: list[Tensor], out_of: list[Tensor]) -> None:
        found.append(len(into))
        plain(into, out_of)

    monkeypatch.setattr(torch, "_foreach_copy_", copying)
    return found


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with casts one by one."""

    def run(model: PeftModel, x: Tensor) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(copies, "FIRST", 10**9)
            return stepped(model, x)

    return run


@pytest.mark.parametrize("r", [3, 8])
@pytest.mark.parametrize("again", [False, True])
def test_all_that_is_left_is_cast_in_one_step(again: bool, r: int, counted: list[int], singly: Any) -> None:
    model, x = made(again, r=r), torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    wanted = singly(model, x)
    for _ in range(2):
        found = stepped(model, x)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert counted == [TOGETHER] * 2
    assert wanted.keys() == found.keys()
    assert len(wanted) == 1 + TENSORS


def test_layers_with_one_input_have_one_thin_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    found: list[int] = []
    plain = lowrank._shrunk

    def shrinking(x: Tensor, A: Tensor, rate: float) -> Any:
        found.append(len(A))
        return plain(x, A, rate)

    monkeypatch.setattr(lowrank, "_shrunk", shrinking)
    stepped(model, x)
    assert found == [8] * 3 * LAYERS
    found.clear()
    stepped(model, x)
    assert found == [8] * 3 + [24] * (LAYERS - 1)


def test_a_layer_that_is_expected_may_stay_away(singly: Any) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    stepped(model, x)
    last: Any = model.base_model.model.layers[-1]
    wanted = singly(model, x)
    last.forward = lambda x: last.q(x) * last.k(2 * x / 2).sigmoid() + last.v(x)  # another tensor with the same numbers
    for _ in range(2):
        found = stepped(model, x)
        assert torch.equal(found["y"], wanted["y"])
        for name, value in wanted.items():  # sums of gradients are rounded elsewhere
            assert (found[name] - value).norm() <= 2e-2 * value.norm(), name


def test_a_call_sees_what_was_written_before_it_and_in_it(counted: list[int], singly: Any) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    stepped(model, x)
    last: Any = model.base_model.model.layers[-1].v
    last.lora_B["default"].weight.data = torch.ones(8, 8)  # leaves no trace in the version
    found = stepped(model, x)
    assert torch.equal(found["y"], singly(model, x)["y"])
    before: Any = model.base_model.model.layers[-2].q

    def writes(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            last.lora_B["default"].weight.mul_(2)

    handle = before.register_forward_pre_hook(writes)
    found = stepped(model, x)
    handle.remove()
    assert torch.equal(found["y"], stepped(model, x)["y"])
    assert len(counted) == 3


def test_calls_before_their_backwards_do_not_disturb_each_other(singly: Any) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    wanted = singly(model, x)
    model.zero_grad()
    ys = [model(x) for _ in range(3)]
    for y in ys:
        y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 3 * wanted[name])


def test_another_adapter_has_copies_of_its_own(counted: list[int], singly: Any) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    model.add_adapter("b", model.peft_config["default"])
    for name in ("default", "default", "b", "b", "default"):
        model.set_adapter(name)
        assert torch.equal(stepped(model, x)["y"], singly(model, x)["y"])
    assert counted == [TOGETHER] * 2  # each adapter's second call in a row


def test_what_is_gone_is_not_taken_for_what_has_its_place(singly: Any) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    stepped(model, x)
    home = home_of(model.get_base_model())
    assert home.asked is not None
    gone = [nn.Parameter(torch.ones(1)) for _ in home.asked.pairs]
    refs = [(weakref.ref(tensor), weakref.ref(tensor)) for tensor in gone]
    home.asked.pairs = dict(zip(home.asked.pairs, refs, strict=True))  # their numbers, given again
    gone.clear()
    assert torch.equal(stepped(model, x)["y"], singly(model, x)["y"])


def test_copies_of_a_model_start_without() -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    stepped(model, x)
    wanted = stepped(model, x)["y"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(stepped(other, x)["y"], wanted)


def test_pairs_of_another_dtype_may_meet_the_others(singly: Any) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    for layer in model.base_model.model.layers:
        for box in (layer.k.lora_A, layer.k.lora_B):
            box["default"].to(torch.bfloat16)
    for _ in range(3):
        assert torch.equal(stepped(model, x)["y"], singly(model, x)["y"])


def test_without_kernels_nothing_is_asked_for(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(), torch.randn(4, 8, dtype=torch.bfloat16)
    monkeypatch.setenv(SWITCH, "0")
    kernels.cache_clear()
    stepped(model, x)
    stepped(model, x)
    monkeypatch.undo()
    kernels.cache_clear()
    assert counted == []
