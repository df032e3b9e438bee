# SPDX-License-Identifier: Apache-2.0
"""LoRA on the stacks of experts of real models: two parameters of one module, by the laws and as the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import graftlet
from tests.model.models import IDS, SIZES, adapted, load, logits, lora, move, save, silent

peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 4}
QWEN: dict[str, Any] = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.3)  # some models leave their stacks as they come, or at zero
    return model


def mixtral() -> Any:
    return seeded(MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def qwen2() -> Any:
    return seeded(Qwen2MoeForCausalLM, Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=8))


def qwen3() -> Any:
    return seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN))


def gpt_oss() -> Any:
    return seeded(GptOssForCausalLM, GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def llama4() -> Any:
    more = {"intermediate_size_mlp": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_chunk_size": 16}
    sizes: dict[str, Any] = {**SMALL, **more, "interleave_moe_layer_step": 1}
    return seeded(Llama4ForCausalLM, Llama4TextConfig(**sizes))


MODELS: list[Callable[[], Any]] = [mixtral, qwen2, qwen3, gpt_oss, llama4]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ONE = ["experts.down_proj"]
models = pytest.mark.parametrize("build", MODELS)


def on(names: list[str], lib: Any = graftlet, **values: Any) -> Any:
    return lora(lib, target_modules=["q_proj"], target_parameters=names, **values)


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


@models
@pytest.mark.parametrize("names", [ONE, BOTH], ids=["one", "both"])
def test_it_changes_nothing_at_first_then_merges_and_comes_off_again(build: Any, names: list[str]) -> None:
    plain = logits(build())
    model = adapted(build(), on(names))
    close(logits(model), plain)
    weights = {k: t.clone() for k, t in graftlet.get_base_model_state_dict(model).items()}
    move(model)
    moved = logits(model)
    assert not moved.allclose(plain, atol=1e-3)
    with model.disable_adapter():
        close(logits(model), plain)
    model.merge_adapter()
    close(logits(model), moved)
    model.unmerge_adapter()
    assert all(t.equal(weights[k]) for k, t in graftlet.get_base_model_state_dict(model).items())
    close(logits(copy.deepcopy(model).merge_and_unload()), moved)
    assert logits(model.unload()).equal(plain)


@models
def test_each_parameter_has_a_part_in_it_and_learns(build: Any) -> None:
    model = adapted(build(), on(BOTH))
    move(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learning.values())
    assert all("lora_" in n for n in learning)
    sizes = {p.shape for n, p in learning.items() if "experts" in n and "lora_A" in n}
    assert all(rows == 4 * 2 for rows, _ in sizes)  # experts x r


@models
def test_it_is_saved_and_loaded(build: Any, tmp_path: Path) -> None:
    model = adapted(build(), on(BOTH))
    move(model)
    save(model, tmp_path)
    again = load(build(), tmp_path)
    assert logits(again).equal(logits(model))
    assert sorted(again.peft_config["default"].target_parameters) == sorted(BOTH)


@models
def test_the_order_of_the_names_means_nothing(build: Any) -> None:
    first, second = (adapted(build(), on(names)).state_dict() for names in (BOTH, BOTH[::-1]))
    assert {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in second.items()}


@models
def test_an_adapter_on_another_parameter_is_saved_as_if_it_were_alone(build: Any, tmp_path: Path) -> None:
    model = adapted(build(), on(ONE))
    model.add_adapter("other", on(["experts.gate_up_proj"]))
    model.set_adapter("other")
    move(model)
    save(model, tmp_path, selected_adapters=["other"])
    alone = adapted(build(), on(["experts.gate_up_proj"]))
    keys = graftlet.load_peft_weights(tmp_path / "other").keys()
    assert keys == graftlet.get_peft_model_state_dict(alone).keys()
    assert logits(load(build(), tmp_path / "other")).equal(logits(model))
    again = adapted(build(), on(BOTH))
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other")
    close(logits(again), logits(model))


@models
def test_two_adapters_act_alone_and_together(build: Any) -> None:
    model = adapted(build(), on(BOTH))
    model.add_adapter("other", on(ONE))
    move(model)
    model.set_adapter("other")
    move(model, 0.2)
    alone = logits(model)
    model.set_adapter("default")
    first = logits(model)
    assert not first.allclose(alone, atol=1e-3)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    model.merge_adapter()
    close(logits(model), together)
    model.unmerge_adapter()
    model.delete_adapter("other")
    model.set_adapter("default")
    close(logits(model), first)


@models
@pytest.mark.parametrize("names", [ONE, BOTH], ids=["one", "both"])
def test_it_is_the_references(build: Any, names: list[str], tmp_path: Path) -> None:
    ours, theirs = adapted(build(), on(names)), adapted(build(), on(names, peft), peft)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    move(ours)
    theirs.load_state_dict(ours.state_dict())
    close(logits(ours), logits(theirs))
    for model, lib in ((ours, peft), (theirs, graftlet)):
        save(model, tmp_path)
        close(logits(load(build(), tmp_path, lib)), logits(ours))
    with silent():
        close(logits(theirs.merge_and_unload()), logits(ours.merge_and_unload()))
