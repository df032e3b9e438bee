# SPDX-License-Identifier: Apache-2.0
"""What learns after each operation: as in the reference, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlet
from tests.model.models import Net, adapted, learning, load, lora, save, silent

peft = pytest.importorskip("peft")

Trail = list[tuple[str, list[str], list[str]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plain", "copies")}
    save(adapted(Net(), net(graftlet)), folders["plain"])
    save(adapted(Net(), net(graftlet, modules_to_save=["head"])), folders["copies"])
    return folders


def net(lib: Any, **values: Any) -> Any:
    return lora(lib, **{"target_modules": ["a", "b"], **values})


def trail(lib: Any, model: Any, steps: list[Callable[[Any], Any]]) -> Trail:
    """What learns, and what is active, at the start and after each step."""
    found = []
    for i, step in enumerate([lambda m: None, *steps]):
        with silent():
            step(model)
        found.append((f"step {i}", sorted(learning(model)), list(model.active_adapters)))
    return found


def added(name: str, **values: Any) -> Callable[[Any, Any], Any]:
    return lambda lib, m: m.add_adapter(name, net(lib, **values))


def loaded(name: str, kind: str = "plain", **options: Any) -> Callable[[Any, Any, Any], Any]:
    return lambda lib, m, saved: m.load_adapter(saved[kind], name, **options)


def active(name: str, **options: Any) -> Callable[[Any, Any], Any]:
    return lambda lib, m: m.set_adapter(name, **options)


def flags(names: Any, on: bool) -> Callable[[Any, Any], Any]:
    return lambda lib, m: m.set_requires_grad(names, on)


def thaw(lib: Any, m: Any) -> None:
    m.base_model.model.head.weight.requires_grad_(True)


STORIES: dict[str, tuple[Any, list[Any]]] = {
    "add and switch": ({}, [
        added("b"), added("c", target_modules=["head"]), active("b"), active("c"),
        active("default", inference_mode=True), active("default"),
        lambda lib, m: m.base_model.set_adapter(["default", "b"]), lambda lib, m: m.delete_adapter("default"),
    ]),
    "load": ({}, [
        loaded("x"), loaded("y", is_trainable=True), active("x"), loaded("z", "copies"), active("z"),
        lambda lib, m: m.base_model.disable_adapter_layers(), lambda lib, m: m.base_model.enable_adapter_layers(),
    ]),
    "frozen by hand": ({}, [
        flags("default", False), loaded("x"), flags(["default", "x"], True), added("q"), flags("x", False), loaded("y"),
    ]),
    "part of the base thawed": ({}, [thaw, added("q"), loaded("x"), active("q")]),
    "copies": ({"modules_to_save": ["head"]}, [
        added("o", modules_to_save=["head"]), active("o"), added("none"), active("none"),
        lambda lib, m: m.delete_adapter("o"),
    ]),
    "biases": ({"bias": "all"}, [active("default"), loaded("x")]),
    "own biases": ({"bias": "lora_only"}, [active("default")]),
    "inference": ({"inference_mode": True}, [added("b"), active("default"), loaded("x"), active("x"), loaded("y")]),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_get_peft_model_and_on(story: str, saved: dict[str, Path]) -> None:
    values, steps = STORIES[story]
    found = []
    for lib in (peft, graftlet):
        bound = [
            (lambda m, s=s, lib=lib: s(lib, m, saved) if s.__code__.co_argcount == 3 else s(lib, m)) for s in steps
        ]
        found.append(trail(lib, adapted(Net(), net(lib, **values), lib), bound))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["plain", "copies"])
@pytest.mark.parametrize("trainable", [True, False])
def test_from_pretrained_and_on(kind: str, trainable: bool, saved: dict[str, Path]) -> None:
    found = []
    for lib in (peft, graftlet):
        model = load(Net(), saved[kind], lib, is_trainable=trainable)
        steps = [
            lambda m: m.load_adapter(saved["plain"], "x"),
            lambda m, lib=lib: m.add_adapter("n", net(lib)),
            lambda m: m.set_adapter("x"),
            lambda m: m.load_adapter(saved["copies"], "w"),
            lambda m: m.set_adapter("w"),
        ]
        found.append(trail(lib, model, steps))
    assert found[0] == found[1]


def test_disabling_for_a_while_changes_nothing_that_learns(saved: dict[str, Path]) -> None:
    """The reference thaws a frozen adapter when the block ends."""
    model = load(Net(), saved["copies"])
    before = learning(model)
    with model.disable_adapter():
        assert learning(model) == before
    assert learning(model) == before == set()


def test_what_learns_is_what_a_step_moves(saved: dict[str, Path]) -> None:
    model = adapted(Net(), net(graftlet, bias="lora_only", modules_to_save=["head"], init_lora_weights=False)).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not p.equal(before[name])} == learning(model)


def test_biases_learn_only_with_the_adapter_that_they_are_saved_with(saved: dict[str, Path]) -> None:
    """In the reference they learn on under any other adapter."""
    model = adapted(Net(), net(graftlet, bias="all"))
    before = learning(model)
    assert "base_model.model.head.bias" in before
    model.load_adapter(saved["plain"], "x")
    model.set_adapter("x")
    assert not [name for name in learning(model) if name.endswith("bias")]
    model.set_adapter("default")
    assert learning(model) == before
