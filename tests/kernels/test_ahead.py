# SPDX-License-Identifier: Apache-2.0
"""What the layers of a model ask in every call is answered for all of them at once, and is as good as their own answers."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlet import LoraConfig, PeftModel, get_peft_model
from graftlet.core.ahead import Answers, Questions
from graftlet.methods.parts import gained
from graftlet.methods.variants import dora
from tests.kernels.stacked import Stack, stepped

LAYERS = 4


def made(again: bool = False) -> PeftModel:
    torch.manual_seed(0)
    targets = [str(i) for i in range(LAYERS)]
    config = LoraConfig(r=4, use_dora=True, target_modules=targets, init_lora_weights=False)
    return get_peft_model(Stack((nn.Linear(8, 8) for _ in range(LAYERS)), again), config).train()


def layer(model: Any, number: int) -> Any:
    return model.base_model.model.layers[number]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers' norms were found in each go."""
    found: list[int] = []
    plain = gained._every_norm

    def every(asked: Any) -> Any:
        found.append(len(asked))
        return plain(asked)

    monkeypatch.setattr(gained, "_every_norm", every)
    return found


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with answers one by one."""

    def run(model: PeftModel, x: Tensor) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(Answers, "of", lambda *given: None)
            return stepped(model, x)

    return run


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("again", [False, True])
def test_all_are_answered_at_the_first_question(again: bool, counted: list[int], singly: Any) -> None:
    model, x = made(again), torch.randn(3, 8, requires_grad=True)
    wanted = singly(model, x)
    counted.clear()
    assert same(stepped(model, x), wanted)
    assert counted == [1] * (2 if again else 1) * LAYERS
    counted.clear()
    for _ in range(2):
        assert same(stepped(model, x), wanted)
    assert counted == [LAYERS] * 2


def test_answers_are_those_of_the_tensors_as_they_are(counted: list[int], singly: Any) -> None:
    model, x = made(), torch.randn(3, 8)
    stepped(model, x)
    thin, wide = layer(model, 1).lora_A["default"].weight, layer(model, 2).base_layer.weight
    with torch.no_grad():
        thin.mul_(3)
    wide.data = wide.data + 1  # leaves no trace in the version
    assert same(stepped(model, x), singly(model, x))

    def writes(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            thin.mul_(2)

    stepped(model, x)
    handle = layer(model, 1).register_forward_pre_hook(writes)
    counted.clear()
    found = stepped(model, x)
    handle.remove()
    assert counted == [LAYERS, 1]
    assert torch.equal(found["y"], singly(model, x)["y"])


def test_another_adapter_asks_for_itself(counted: list[int], singly: Any) -> None:
    model, x = made(), torch.randn(3, 8)
    model.add_adapter("b", model.peft_config["default"])
    for name in ("default", "b", "b", "default"):
        model.set_adapter(name)
        assert same(stepped(model, x), singly(model, x))


def test_copies_of_a_model_start_without(counted: list[int]) -> None:
    model, x = made(), torch.randn(3, 8)
    stepped(model, x)
    wanted = stepped(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        counted.clear()
        assert same(stepped(other, x), wanted)
        assert counted == [1] * LAYERS


def test_only_what_is_there_is_asked_about() -> None:
    def answer(questions: Any) -> list[Tensor]:
        return [tensors[0] * number for tensors, number in questions]

    held, meta = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    made, device = Questions(), held.device
    for tensors in ((held,), (meta,), (held, torch.ones(2)), (held, nn.Parameter(torch.ones(2)))):
        made[tuple(map(id, tensors))] = answer, list(map(weakref.ref, tensors)), 2.0
    del tensors  # the last of them is gone, as nobody else has it
    assert [q[0] for q in made.again(answer, device)] == [(held,)]
    answers = Answers(made)
    assert answers.of(answer, (held,), 3.0) is None  # the number was another
    found = answers.of(answer, (held,), 2.0)
    assert found is not None
    assert torch.equal(found, 2 * held)


def test_what_a_layer_is_made_of_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, asked = made(), torch.randn(3, 8), []
    plain = dora.DoRA.lean
    monkeypatch.setattr(dora.DoRA, "lean", lambda *given: asked.append(1) or plain(*given))
    for _ in range(3):
        stepped(model, x)
    assert len(asked) == LAYERS
    layer(model, 0).lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(8))
    stepped(model, x)
    assert len(asked) == LAYERS + 1
