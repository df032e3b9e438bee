# SPDX-License-Identifier: Apache-2.0
"""Known losses of the field, each named by what it protects. Those not here are in `tests/model` and beside this file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import graftlet
from graftlet.errors import HeadWarning
from tests.hostile.tools import WEIGHTS
from tests.model.models import IDS, adapted, bert, llama, load, logits, lora, move, save, silent


def test_modules_to_save_are_in_the_file_and_come_back(tmp_path: Path) -> None:
    model = adapted(llama(), lora(modules_to_save=["lm_head"]))
    move(model)
    save(model, tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    assert torch.equal(logits(load(llama(), tmp_path)), logits(model))
    again = load(llama(), tmp_path)
    save(again, tmp_path / "again")  # a loaded one keeps it too
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()


def test_resized_embeddings_are_in_the_file_where_the_base_has_no_name(tmp_path: Path) -> None:
    with silent():
        model = graftlet.get_peft_model(llama(), lora())
        model.get_base_model().resize_token_embeddings(13)
    save(model, tmp_path)
    assert any("embed_tokens" in key for key in load_file(tmp_path / WEIGHTS))


def test_a_classifiers_head_is_told_to_be_frozen_or_trained_along(tmp_path: Path) -> None:
    with pytest.warns(HeadWarning):
        graftlet.get_peft_model(bert(), lora(target_modules=["query"]))
    model = adapted(bert(), lora(target_modules=["query"], task_type="SEQ_CLS"))
    move(model)
    save(model, tmp_path)
    assert any("classifier" in key for key in load_file(tmp_path / WEIGHTS))


def test_a_compiled_model_is_saved_by_its_own_keys(tmp_path: Path) -> None:
    base = llama()
    base.model = torch.compile(base.model)  # a wrapper with a level of its own; nothing is compiled until it is called
    save(adapted(base, lora(init_lora_weights=False)), tmp_path / "inside")
    model = torch.compile(adapted(llama(), lora(init_lora_weights=False)))
    save(model, tmp_path / "around")
    for name in ("inside", "around"):
        tensors = load_file(tmp_path / name / WEIGHTS)
        assert not [k for k in tensors if "_orig_mod" in k]
        assert all(t.numel() for t in tensors.values())
        load(llama(), tmp_path / name)


def test_keys_of_a_compiled_model_are_not_ignored(tmp_path: Path) -> None:
    from tests.hostile.tools import rewritten

    model = adapted(llama(), lora(init_lora_weights=False))
    save(model, tmp_path)

    def wrapped(tensors: Any) -> None:
        held = dict(tensors)
        tensors.clear()
        tensors.update({k.replace("model.model.", "model._orig_mod.model."): v for k, v in held.items()})

    rewritten(tmp_path, wrapped)
    assert torch.equal(logits(load(llama(), tmp_path)), logits(model))


def test_a_merge_leaves_tied_weights_right(tmp_path: Path) -> None:
    for target in ("lm_head", "embed_tokens"):
        with silent():
            model = graftlet.get_peft_model(llama(tie_word_embeddings=True), lora(target_modules=[target])).eval()
        move(model)
        wanted = logits(model)
        with silent():
            merged = model.merge_and_unload()
        assert torch.allclose(logits(merged), wanted, atol=1e-5), target
        with silent():
            merged.save_pretrained(tmp_path / target)
            again = type(merged).from_pretrained(tmp_path / target).eval()
        assert torch.allclose(logits(again), wanted, atol=1e-5), target


def test_token_rows_of_a_tied_head_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), lora(trainable_token_indices=[1, 3]))
    move(model)
    wanted = logits(model)
    save(model, tmp_path)
    assert torch.allclose(logits(load(llama(tie_word_embeddings=True), tmp_path)), wanted, atol=1e-6)
    with silent():
        merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), wanted, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_gradients(reentrant: bool) -> None:
    model = graftlet.get_peft_model(llama(), lora()).train()
    with silent():
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        model(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in found.values())
    assert all(g.abs().sum() > 0 for n, g in found.items() if "lora_B" in n and g is not None)


def test_merging_twice_and_unmerging_drifts_by_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = adapted(llama().to(dtype), lora(init_lora_weights=False))
        before = {k: t.clone() for k, t in model.state_dict().items()}
        for _ in range(20):
            model.merge_adapter()
            model.unmerge_adapter()
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_prefix_stays_with_every_kind_of_cache() -> None:
    config = graftlet.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = adapted(llama(), config)
    move(model)
    plain = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    for cache in (DynamicCache(),):
        assert torch.equal(
            model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, past_key_values=cache), plain
        )
    assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False), plain)
    with model.disable_adapter():
        assert not torch.equal(logits(model), logits(load_twin(model)))


def load_twin(model: Any) -> Any:
    return copy.deepcopy(model)


def test_adapters_follow_their_model_to_another_device_and_dtype() -> None:
    for values in ({}, {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}, {"use_dora": True}):
        model = adapted(llama(), lora(**values)).to("meta")
        assert {t.device.type for t in model.state_dict().values()} == {"meta"}
        model = adapted(llama(), lora(**values)).double()
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}


def test_the_same_seed_gives_the_same_bytes_with_other_adapters_or_without(tmp_path: Path) -> None:
    torch.manual_seed(7)
    save(graftlet.get_peft_model(llama(), lora()), tmp_path / "one")
    model = graftlet.get_peft_model(llama(), lora(), "first")
    torch.manual_seed(0)
    llama()
    torch.manual_seed(7)
    save(graftlet.get_peft_model(llama(), lora()), tmp_path / "two")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    alone = logits(model.eval())
    for name in ("x", "y"):
        model.add_adapter(name, lora(init_lora_weights=False))
    assert torch.equal(logits(model), alone)


def test_the_other_adapters_of_a_folder_can_be_loaded_each(tmp_path: Path) -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    save(model, tmp_path)
    again = load(llama(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        with model.using(name), again.using(name):
            assert torch.equal(logits(again), logits(model))
