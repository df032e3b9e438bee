# SPDX-License-Identifier: Apache-2.0
"""What methods do while a model is trained, against the reference: AdaLoRA's budget and penalty, OSF's gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.testing.benches import BENCHES, Around, seeded

from .reference import move, peft

IDS = torch.tensor([[3, 5, 1, 7, 2, 2], [4, 4, 0, 6, 9, 1]])


@pytest.fixture
def base() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    with seeded(0):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def pair(base: nn.Module, **values: Any) -> tuple[Any, Any]:
    """The model with AdaLoRA by the reference and by Graftlet, with the same tensors, in training."""
    values = {"task_type": "CAUSAL_LM", "init_r": 4, "target_r": 2, "total_step": 12, "lora_alpha": 6, **values}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**values))
    ours = graftlet.get_peft_model(copy.deepcopy(base), graftlet.AdaLoraConfig(**values))
    move(theirs, 0.1)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


PLANS = [{"tinit": 2, "tfinal": 3, "deltaT": 2}, {}, {"tinit": 1, "tfinal": 4, "deltaT": 3}]


@pytest.mark.parametrize("plan", PLANS, ids=["usual", "every step", "long end"])
def test_the_budget_is_cut_step_by_step_as_by_the_reference(base: nn.Module, plan: dict[str, int]) -> None:
    theirs, ours = pair(base, **plan)
    optimizers = [torch.optim.SGD(learning(m).values(), lr=0.1) for m in (theirs, ours)]
    for step in range(13):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        ours.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        left = theirs.peft_config["default"].rank_pattern or {}
        assert (ours.peft_config["default"].rank_pattern or {}) == {
            k.removesuffix(".default"): v for k, v in left.items()
        }
        for name, parameter in learning(theirs).items():
            torch.testing.assert_close(learning(ours)[name], parameter, rtol=0, atol=2e-5)
    assert sum(map(sum, left.values())) == 8


def test_what_is_cut_is_not_saved_and_loads_in_both(base: nn.Module, tmp_path: Any) -> None:
    _, ours = pair(base)
    ours.peft_config["default"].rank_pattern = {
        f"model.layers.{i}.self_attn.{name}.lora_E": [bool(i), False, True, name == "q_proj"]
        for i in (0, 1)
        for name in ("q_proj", "v_proj")
    }
    with torch.no_grad():
        for name, parameter in learning(ours).items():
            if "lora_E" in name:
                path = name.removeprefix("base_model.model.").removesuffix(".default")
                parameter *= torch.tensor(ours.peft_config["default"].rank_pattern[path])[:, None]
    ours.save_pretrained(tmp_path)
    shapes = {
        k.rpartition("_proj.")[2]: t.shape[0]
        for k, t in graftlet.load_peft_weights(tmp_path).items()
        if "layers.0.self_attn.v" in k
    }
    assert shapes == {"lora_A": 1, "lora_B": 8, "lora_E": 1}
    expected = ours.eval()(input_ids=IDS).logits
    for library in (graftlet, peft):
        again = library.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_the_penalty_is_the_references_in_training_alone(base: nn.Module) -> None:
    theirs, ours = pair(base)
    torch.testing.assert_close(ours(input_ids=IDS, labels=IDS).loss, theirs(input_ids=IDS, labels=IDS).loss)
    plain = nn.functional.cross_entropy(ours.eval()(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(ours(input_ids=IDS, labels=IDS).loss, plain)


def test_subspaces_are_frozen_as_by_the_reference(base: nn.Module) -> None:
    values = {"r": 8, "num_subspaces": 3, "use_asa": True, "mask_interval": 2, "init_warmup": 1, "final_warmup": 9}
    values |= {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdamssConfig(**values, asa_target_subspaces=5)).train()
    ours = graftlet.get_peft_model(copy.deepcopy(base), graftlet.AdamssConfig(**values, asa_target_subspaces=5)).train()
    move(theirs, 0.1)
    ours.load_state_dict(theirs.state_dict())
    allocator = ours.base_model.allocators()["default"]
    budget = allocator.budget

    def one_fewer(step: int) -> int:
        """The reference keeps those above the last one to be kept: one fewer than it plans."""
        planned = budget(step)
        return planned if planned >= len(learning(ours)) // 2 else planned - 1

    allocator.budget = one_fewer
    whole = learning(ours).keys()
    for step in range(1, 10):
        for model in (theirs, ours):
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            model.base_model.update_and_allocate(step)
        assert learning(ours).keys() == learning(theirs).keys()
    assert 0 < len(learning(ours)) < len(whole)


def test_the_budget_of_subspaces_is_what_is_left(base: nn.Module) -> None:
    config = graftlet.AdamssConfig(
        r=8, num_subspaces=3, use_asa=True, mask_interval=1, init_warmup=0, final_warmup=4, asa_target_subspaces=5,
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    model = graftlet.get_peft_model(base, config).train()
    move(model, 0.1)
    for step in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.base_model.update_and_allocate(step)
    assert len(learning(model)) == 2 * 5


def grads(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    model.zero_grad()
    model(x).square().sum().backward()
    return ((n, p.grad) for n, p in learning(model).items() if p.grad is not None)


def test_osf_learns_beside_what_it_keeps_also_in_a_copy() -> None:
    bench = BENCHES["linear"]
    (x,) = bench.example()
    theirs = peft.get_peft_model(bench.model(), peft.OSFConfig(target_modules=["l"], effective_rank=3))
    ours = graftlet.get_peft_model(bench.model(), graftlet.OSFConfig(target_modules=["l"], effective_rank=3))
    move(theirs)
    ours.load_state_dict(theirs.state_dict())
    expected = dict(grads(theirs, x))
    for model in (ours, copy.deepcopy(ours)):
        for name, grad in grads(model, x):
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


def test_boft_reads_a_file_whose_factors_fell_to_one(tmp_path: Any) -> None:
    model = graftlet.get_peft_model(
        Around(nn.Linear(8, 4)), graftlet.BOFTConfig(target_modules=["l"], boft_block_size=2)
    )
    move(model)
    model.save_pretrained(tmp_path)
    config = graftlet.BOFTConfig(target_modules=["l"], boft_block_size=2, boft_n_butterfly_factor=3)
    again = graftlet.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, config=config)
    x = torch.randn(3, 8)
    torch.testing.assert_close(again(x), model(x))
