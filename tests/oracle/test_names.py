# SPDX-License-Identifier: Apache-2.0
"""The reference's public names: all of them are there, and mean the same."""

from __future__ import annotations

import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlet
from graftlet.core.tuner import BaseTuner
from graftlet.errors import AdapterFileError, ConfigError
from graftlet.registry import method
from tests.model.models import IDS, llama, logits, lora, move

from .reference import peft

TYPES = list(peft.PEFT_TYPE_TO_CONFIG_MAPPING)


def test_every_public_name_is_there() -> None:
    public = {n for n in dir(peft) if n[0] != "_" and not isinstance(getattr(peft, n), types.ModuleType)}
    assert public <= set(dir(graftlet))
    assert all(getattr(graftlet, name) is not None for name in public)


@pytest.mark.parametrize("kind", TYPES, ids=[str(t.value) for t in TYPES])
def test_the_tables_name_the_references_classes(kind: Any) -> None:
    for table in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"):
        ours = getattr(graftlet, table)[graftlet.PeftType(kind.value)]
        assert ours.__name__ == getattr(peft, table)[kind].__name__
    if kind in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
        assert graftlet.PeftType(kind.value) in graftlet.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_a_named_tuner_is_what_get_peft_model_makes() -> None:
    tuner = graftlet.LoraModel(llama(), lora(graftlet), "default")
    wrapped = graftlet.get_peft_model(llama(), lora(graftlet))
    assert isinstance(tuner, BaseTuner)
    assert set(tuner.state_dict()) == set(wrapped.base_model.state_dict())
    theirs = peft.LoraModel(llama(), lora(peft), "default")
    assert set(tuner.state_dict()) == set(theirs.state_dict())
    assert type(pickle.loads(pickle.dumps(tuner))) is graftlet.LoraModel
    with pytest.raises(ConfigError, match="IA3Model takes a IA3Config; LoraConfig was given"):
        graftlet.IA3Model(llama(), lora(graftlet), "default")


def test_blooms_prefix_has_the_references_layout() -> None:
    parts = tuple(torch.randn(2, 3, 4, 5, 6) for _ in range(2))
    ours = graftlet.bloom_model_postprocess_past_key_value(parts)
    theirs = peft.bloom_model_postprocess_past_key_value(parts)
    assert [(k.shape, v.shape) for k, v in ours] == [(k.shape, v.shape) for k, v in theirs]
    assert all(ours[i][1].equal(theirs[i][1]) for i in range(2))
    assert all(
        keys.equal(parts[0][i].flatten(0, 1).mT) for i, (keys, _) in enumerate(ours)
    )  # theirs mixes heads and tokens


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "parameter": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_bases_state_has_its_own_keys(case: str) -> None:
    plain = llama()
    wanted = {k: t.clone() for k, t in plain.state_dict().items()}
    model = graftlet.get_peft_model(plain, lora(graftlet, **CONFIGS[case]))
    move(model)
    found = graftlet.get_base_model_state_dict(model)
    assert found.keys() == wanted.keys()
    assert all(found[k].equal(t) for k, t in wanted.items())
    other = {k: torch.randn_like(t) for k, t in wanted.items()}
    assert graftlet.set_base_model_state_dict(model, other) == ([], [])
    fresh = llama()
    fresh.load_state_dict(other)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(fresh))


def test_the_state_of_a_prompts_base_and_of_shared_tensors() -> None:
    for config in (
        graftlet.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        graftlet.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        graftlet.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    ):
        model = graftlet.get_peft_model(llama(num_key_value_heads=4), config)
        assert graftlet.get_base_model_state_dict(model).keys() == llama(num_key_value_heads=4).state_dict().keys()


def test_a_wrong_state_changes_nothing() -> None:
    model = graftlet.get_peft_model(llama(), lora(graftlet))
    state = {k: t.clone() for k, t in graftlet.get_base_model_state_dict(model).items()}
    before = logits(model)
    key = next(iter(state))
    with pytest.raises(AdapterFileError, match=f"missing: .*{key}.*unknown: .*extra"):
        graftlet.set_base_model_state_dict(model, {**{k: t + 1 for k, t in state.items() if k != key}, "extra": IDS})
    with pytest.raises(AdapterFileError, match="shape"):
        graftlet.set_base_model_state_dict(model, {**{k: t + 1 for k, t in state.items()}, key: torch.zeros(1)})
    assert logits(model).equal(before)
    assert graftlet.set_base_model_state_dict(model, {"extra": IDS}, strict=False).unexpected_keys == ["extra"]


def test_a_name_that_is_taken_is_refused() -> None:
    entry = graftlet.registry.lookup("lora")
    with pytest.raises(ConfigError, match=r"'LoRA' is taken, by graftlet\.methods\.lora\.LoRA"):
        method("LoRA", entry.config)(type("Mine", (entry.method,), {"__module__": __name__}))
    assert graftlet.registry.lookup("lora") is entry


def test_xlora_is_not_put_into_a_model_without_its_call(tmp_path: Path) -> None:
    graftlet.get_peft_model(llama(), lora(graftlet)).save_pretrained(tmp_path)
    base = llama()
    before = set(base.state_dict())
    with pytest.raises(ConfigError, match="XLORA runs the whole model before each call; use get_peft_model"):
        graftlet.inject_adapter_in_model(graftlet.XLoraConfig(hidden_size=8, adapters={"0": str(tmp_path)}), base)
    assert set(base.state_dict()) == before
