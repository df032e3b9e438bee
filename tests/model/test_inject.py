# SPDX-License-Identifier: Apache-2.0
"""Adapters put into a model in place, as diffusers and transformers do it; compiled models; any adapter name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftlet
from graftlet.errors import MergeWarning, NoMatchingPeftModuleError
from graftlet.tuners.kinds import BaseTunerLayer
from tests.model.models import adapted, learning, llama, load, logits, lora, move, save, silent

peft = pytest.importorskip("peft")

CONFIGS: dict[str, Any] = {
    "lora": lora(target_modules=["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]),
    "lora-and-more": lora(modules_to_save=["lm_head"], trainable_token_indices=[1, 2]),
    "ia3": graftlet.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "oft": graftlet.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "vera": graftlet.VeraConfig(target_modules=["q_proj"], r=2),
    "shira": graftlet.ShiraConfig(target_modules=["v_proj"], r=1),
}


def injected(config: Any, **options: Any) -> Any:
    with silent():
        return graftlet.inject_adapter_in_model(config, llama(), **options)


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_targets_come_from_the_tensors(name: str, on_meta: bool) -> None:
    config = CONFIGS[name]
    model = injected(config)
    move(model)
    tensors = graftlet.get_peft_model_state_dict(model)
    assert tensors
    assert not [k for k in tensors if k.startswith("base_model.")]
    values = {k: v for k, v in config.to_dict().items() if k not in ("peft_type", "target_modules", "runtime_config")}
    other = type(config)(**values, target_modules=["down_proj"])
    again = injected(other, state_dict=tensors, low_cpu_mem_usage=on_meta)
    result = graftlet.set_peft_model_state_dict(again, tensors)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert not any(p.is_meta for p in again.parameters())
    assert logits(again).equal(logits(model))
    assert again.peft_config["default"] is other


def test_an_injected_model_is_the_references() -> None:
    for values in ({}, {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}):
        with silent():
            theirs: Any = peft.inject_adapter_in_model(lora(peft, **values), llama())
            theirs = peft.inject_adapter_in_model(lora(peft), theirs, "other")
        ours = graftlet.inject_adapter_in_model(lora(**values), llama())
        ours = graftlet.inject_adapter_in_model(lora(), ours, "other")
        assert set(theirs.state_dict()) == set(ours.state_dict())
        assert learning(theirs) == learning(ours)
        place = "model.layers.0.self_attn.q_proj"
        assert theirs.get_submodule(place).active_adapters == ours.get_submodule(place).active_adapters == ["other"]
        for name in ("default", "other")[: 1 if values else 2]:  # the reference fails on rows that another one trains
            wanted = set(peft.get_peft_model_state_dict(theirs, adapter_name=name))
            assert set(graftlet.get_peft_model_state_dict(ours, adapter_name=name)) == wanted
        with silent():
            result = peft.set_peft_model_state_dict(theirs, graftlet.get_peft_model_state_dict(ours))
        assert not result.unexpected_keys


def test_tensors_of_another_model_are_refused() -> None:
    model = llama()
    before = set(model.state_dict())
    with pytest.raises(NoMatchingPeftModuleError, match=r"unet\.down\.lora_A\.weight"):
        graftlet.inject_adapter_in_model(lora(), model, state_dict={"unet.down.lora_A.weight": torch.zeros(2, 8)})
    assert set(model.state_dict()) == before
    assert not hasattr(model, "peft_config")


def test_transformers_own_adapters(tmp_path: Path) -> None:
    """`model.add_adapter` and `load_adapter` of transformers call the installed `peft`; the files are what counts."""
    model = adapted(llama(), lora(init_lora_weights=False))
    save(model, tmp_path)
    with silent():
        theirs = llama()
        theirs.load_adapter(str(tmp_path))
    assert logits(theirs).allclose(logits(model), atol=1e-6)


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_models_leave_no_trace_in_the_keys(outside: bool, tmp_path: Path) -> None:
    wanted = set(graftlet.get_peft_model_state_dict(adapted(llama(), lora())))
    if outside:
        model: Any = torch.compile(adapted(llama(), lora(init_lora_weights=False)), backend="eager")
    else:
        model = adapted(torch.compile(llama(), backend="eager"), lora(init_lora_weights=False))  # type: ignore[arg-type]
    found = graftlet.get_peft_model_state_dict(model, unwrap_compiled=True)
    assert set(found) == wanted
    save(model, tmp_path)
    again = load(llama(), tmp_path)
    assert all(found[k].equal(v) for k, v in graftlet.get_peft_model_state_dict(again).items())
    marked = {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in found.items()}
    assert graftlet.set_peft_model_state_dict(again, marked) == ([], [])


@pytest.mark.parametrize("name", ["0", "weight", "lora_A", "ünïcode", "bias", "training", "keys", "modules_to_save"])
def test_an_adapter_may_have_any_name(name: str, tmp_path: Path) -> None:
    config = lora(modules_to_save=["lm_head"], trainable_token_indices=[1], init_lora_weights=False)
    model = graftlet.get_peft_model(llama(), config, adapter_name=name).eval()
    move(model)
    model.load_state_dict(model.state_dict())
    assert set(graftlet.get_peft_model_state_dict(model, adapter_name=name)) == set(
        graftlet.get_peft_model_state_dict(
            adapted(llama(), lora(modules_to_save=["lm_head"], trainable_token_indices=[1]))
        )
    )
    save(model, tmp_path)
    assert logits(load(llama(), tmp_path / name, adapter_name=name)).equal(logits(model))
    assert logits(load(llama(), tmp_path / name, peft)).allclose(logits(model), atol=1e-6)
    with silent():
        model.load_adapter(tmp_path / name, "other")
    model.delete_adapter(name)
    assert model.active_adapters == ["other"]


def test_an_adapter_that_is_merged_is_unmerged_for_the_next_one() -> None:
    model = graftlet.inject_adapter_in_model(lora(init_lora_weights=False), llama())
    base = logits(llama())
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    with pytest.warns(MergeWarning, match="unmerged to activate other"):
        graftlet.inject_adapter_in_model(lora(), model, "other")
    assert logits(model).equal(base)
