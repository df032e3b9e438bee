# SPDX-License-Identifier: Apache-2.0
"""LoRA+, LoRA-FA and the Riemannian optimiser: the reference's steps, and by name in a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import graftlet
from graftlet.errors import ConfigError
from graftlet.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from graftlet.testing.benches import perturb
from graftlet.train.optimisers import optimiser_class
from graftlet.train.optimisers.lorafa import corrected
from graftlet.train.recipe import check
from graftlet.train.run import train
from tests.model.models import IDS, llama

from . import tiny

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
EIGHT = {"base": "AdamW8bit", "min_8bit_size": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora and ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
}


def pair(**options: Any) -> tuple[Any, Any]:
    peft = pytest.importorskip("peft")
    values = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    theirs, ours = (
        lib.get_peft_model(llama(tie_word_embeddings=False), lib.LoraConfig(**values)) for lib in (peft, graftlet)
    )
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def stepped(model: Any, make: Callable[[Any], torch.optim.Optimizer], steps: int = 3) -> dict[str, torch.Tensor]:
    optimizer = make(model)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


def compare(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loraplus_steps_as_the_reference(options: dict[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    from peft.optimizers import create_loraplus_optimizer as reference

    theirs, ours = pair(**options)
    values = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3}
    compare(
        stepped(theirs, lambda m: reference(m, kind, **values)),
        stepped(ours, lambda m: create_loraplus_optimizer(m, kind, **values)),
    )


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_riemannian_steps_are_the_references(options: dict[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    from peft.optimizers import create_riemannian_optimizer as reference

    theirs, ours = pair(**options)
    values = {"lr": 1e-3, "reg": 0.05, "weight_decay": 0.1}
    compare(
        stepped(theirs, lambda m: reference(m, kind, **values)),
        stepped(ours, lambda m: create_riemannian_optimizer(m, kind, **values)),
    )


@pytest.mark.parametrize("options", ["plain", "rslora and ranks", "head"])
def test_lorafa_steps_as_the_reference(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.optimizers.lorafa as reference

    monkeypatch.setattr(reference, "is_bf16_available", lambda: False)  # it rounds the gradient to bfloat16 otherwise
    theirs, ours = pair(**OPTIONS[options])
    compare(
        stepped(theirs, lambda m: reference.create_lorafa_optimizer(m, 2, 3, lr=1e-2, weight_decay=0.1)),
        stepped(ours, lambda m: create_lorafa_optimizer(m, 2, 3, lr=1e-2, weight_decay=0.1)),
    )
    assert not [n for n, p in ours.named_parameters() if "lora_A" in n and p.requires_grad]


def test_lorafa_moves_the_weight_as_near_to_full_training_as_it_can() -> None:
    """The corrected gradient of B, through the frozen A, is the projection of the weight's own gradient."""
    _, ours = pair()
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    optimizer: Any = create_lorafa_optimizer(ours, lr=1e-2)
    layer.base_layer.weight.requires_grad_(True)
    ours(input_ids=IDS, labels=IDS).loss.backward()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    moved = layer.scaling["default"] * corrected(optimizer.factors[id(B)]) @ A
    full = layer.base_layer.weight.grad
    onto = A.T @ torch.linalg.solve(A @ A.T, A)
    torch.testing.assert_close(moved, full @ onto, atol=1e-5, rtol=1e-3)


def test_lorafas_state_survives_a_checkpoint() -> None:
    _, ours = pair()
    again = copy.deepcopy(ours)
    optimizer = create_lorafa_optimizer(ours, lr=1e-2)
    whole = stepped(ours, lambda _: optimizer, 4)
    first = create_lorafa_optimizer(again, lr=1e-2)
    stepped(again, lambda _: first, 2)
    second = create_lorafa_optimizer(again, lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    compare(whole, stepped(again, lambda _: second, 2))


MAKES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "loraplus": lambda m, kind, **k: create_loraplus_optimizer(m, kind, lr=1e-2, loraplus_lr_ratio=4.0, **k),
    "lorafa": lambda m, kind, **k: create_lorafa_optimizer(m, lr=1e-2, optimizer_cls=kind, **k),
    "riemannian": lambda m, kind, **k: create_riemannian_optimizer(m, kind, lr=1e-2, **k),
}


@needs_bitsandbytes
@pytest.mark.parametrize("name", MAKES)
def test_eight_bits_of_state_are_enough(name: str) -> None:
    """The same way as AdamW's, with a state of bytes; embeddings keep theirs in single precision."""
    import bitsandbytes

    kind: Any = bitsandbytes.optim.AdamW8bit
    eight = {"min_8bit_size": 16, "weight_decay": 0.0}
    _, first = pair(target_modules=["embed_tokens", "q_proj", "down_proj"])
    second, start = copy.deepcopy(first), {n: p.detach().clone() for n, p in first.named_parameters()}
    made: list[Any] = []

    def make(model: Any) -> torch.optim.Optimizer:
        made.append(MAKES[name](model, kind, **eight))
        return made[0]

    coarse = stepped(first, make)
    exact = stepped(second, lambda m: MAKES[name](m, torch.optim.AdamW, weight_decay=0.0))
    for key, tensor in exact.items():
        move, wanted = coarse[key] - start[key], tensor - start[key]
        assert (wanted.norm() > 0) == (move.norm() > 0), key
        if wanted.norm():
            assert torch.cosine_similarity(move.flatten(), wanted.flatten(), 0) > 0.9, key
    states = {n: made[0].state[p] for n, p in first.named_parameters() if p in made[0].state}
    assert {s["state1"].dtype for n, s in states.items() if "lora_B.default.weight" in n} == {torch.uint8}


def test_lorafa_with_a_class_of_its_own_takes_that_classes_steps() -> None:
    _, ours = pair()
    again = copy.deepcopy(ours)
    optimizer = create_lorafa_optimizer(again, lr=1e-2)
    again(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {id(p.B): p.B.detach() - 1e-2 * corrected(p) for p in optimizer.factors.values()}  # type: ignore[attr-defined]
    names = {id(p): n for n, p in again.named_parameters()}
    moved = stepped(ours, lambda m: create_lorafa_optimizer(m, lr=1e-2, optimizer_cls=torch.optim.SGD), 1)
    for key, tensor in wanted.items():
        torch.testing.assert_close(moved[names[key]], tensor)


def test_what_does_not_go_is_refused() -> None:
    model = nn.Linear(2, 2)
    for make in (
        lambda: create_riemannian_optimizer(model, torch.optim.SGD, lr=1),
        lambda: create_lorafa_optimizer(model, lr=1),
    ):
        with pytest.raises(ConfigError, match="has none"):
            make()
    _, ours = pair()
    with pytest.raises(ValueError, match="closure"):
        create_riemannian_optimizer(ours, torch.optim.LBFGS, lr=1)
    with pytest.raises(TypeError, match="no subclass"):
        create_riemannian_optimizer(ours, nn.Linear, lr=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reg"):
        create_riemannian_optimizer(ours, torch.optim.SGD, lr=1, reg=-1)
    with pytest.raises(ValueError, match="no closure"):
        create_riemannian_optimizer(ours, torch.optim.SGD, lr=1).step(lambda: 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ratio"):
        create_loraplus_optimizer(ours, torch.optim.SGD, lr=1, loraplus_lr_ratio=0)
    with pytest.raises(ConfigError, match="neither in torch.optim"):
        optimiser_class("NoSuch")


# recipes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loraplus", {"ratio": 8.0}),
        ("lorafa", {}),
        ("lorafa", {"base": "SGD", "momentum": 0.9}),
        ("riemannian", {"reg": 0.1, "base": "SGD"}),
        ("adafactor", {}),
        pytest.param("loraplus", EIGHT, marks=needs_bitsandbytes),
        pytest.param("lorafa", EIGHT, marks=needs_bitsandbytes),
        pytest.param("riemannian", EIGHT, marks=needs_bitsandbytes),
    ],
)
def test_a_recipe_names_its_optimiser(base: Path, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.rows())
    changes = {
        "training": {"optimizer": name, "optimizer_options": options, "max_steps": 3},
        "evaluation": {"samples": 0},
    }
    made = train(check(tiny.recipe(base, data, tmp_path / "out", **changes)), console=Console(quiet=True))
    losses = [e["loss"] for e in made.summary["history"] if "loss" in e]
    assert len(losses) == 3
    assert all(x == x for x in losses)
    tensors = graftlet.load_peft_weights(made.output)
    assert any(t.any() for k, t in tensors.items() if "lora_B" in k)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"optimizer": "lorapluss"}, "did you mean 'loraplus'"),
        ({"optimizer": "adamw_torch", "optimizer_options": {"ratio": 2}}, "optim_args"),
        ({"optimizer": "loraplus", "optimizer_options": {"rato": 2}}, "rato"),
        ({"optimizer": "lorafa", "optimizer_options": {"ratio": 2}}, "ratio"),
    ],
)
def test_a_recipes_wrong_optimiser_is_named(base: Path, tmp_path: Path, training: dict[str, Any], said: str) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.rows())
    recipe = check(tiny.recipe(base, data, tmp_path / "out", training=training, evaluation={"samples": 0}))
    with pytest.raises(ConfigError, match=said):
        train(recipe, console=Console(quiet=True))
