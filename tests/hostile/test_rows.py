# SPDX-License-Identifier: Apache-2.0
"""What is known to go wrong in the field without a word, or with one that helps nobody: here it is right, or told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import graftlet
from graftlet.errors import AdapterFileError, AdapterNameError, ConfigError, GraftletError, MergeWarning
from tests.model.models import IDS, adapted, facts, llama, logits, lora, move, same, save, silent


def trained() -> Any:
    model = adapted(llama(), lora())
    move(model)
    return model


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ("transformers", "auto_mapping='transformers' is a str"),
        ({"parent_library": "transformers"}, "neither a task_type nor a usable auto_mapping"),
        ({"base_model_class": "LlamaForCausalLM"}, "neither a task_type nor a usable auto_mapping"),
        ({"parent_library": 5, "base_model_class": None}, "neither a task_type nor a usable auto_mapping"),
        ({"parent_library": "transformers.utils.hub", "base_model_class": "os"}, "hub.os, which is no model class"),
    ],
    ids=str,
)
def test_a_mapping_that_names_no_model_is_refused(mapping: Any, said: str, tmp_path: Path) -> None:
    save(trained(), tmp_path)
    file = tmp_path / "adapter_config.json"
    changed = {"auto_mapping": mapping, "task_type": None, "base_model_name_or_path": "x"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with silent(), pytest.raises(GraftletError, match=said):
        graftlet.AutoPeftModel.from_pretrained(tmp_path)


def test_a_prompt_for_what_is_no_language_model_is_refused() -> None:
    config = graftlet.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="needs a transformers model with a config and input embeddings; Sequential"):
        graftlet.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)


def test_a_second_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    model = trained()
    save(model, tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    before = facts(model)
    with silent(), pytest.raises(AdapterFileError, match=r"6 missing: .*lora_A\.weight"):
        model.load_adapter(tmp_path, "other")
    assert same(before, model)
    assert list(model.peft_config) == ["default"]


def test_merging_what_is_not_there_is_refused() -> None:
    model = trained()
    before = facts(model)
    with pytest.raises(AdapterNameError, match="no adapter 'nope'"):
        model.merge_adapter(["nope"])
    assert same(before, model)


def test_merging_some_of_the_active_adapters_leaves_the_others_acting() -> None:
    model = trained()
    model.add_adapter("other", lora(r=3))
    move(model)
    model.set_adapter(["default", "other"])
    y = logits(model)
    model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), y)


def test_training_what_is_merged_is_told() -> None:
    model = trained()
    model.train()
    model.eval().merge_adapter()
    with pytest.warns(MergeWarning, match=r"adapters default are merged .* unmerge_adapter\(\) before training"):
        model.train()
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergeWarning)
        model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_a_name_that_is_a_methods_prefix_is_a_name(tmp_path: Path) -> None:
    model = graftlet.get_peft_model(llama(), lora(), "lora_")
    move(model)
    save(model.eval(), tmp_path)
    again = graftlet.PeftModel.from_pretrained(llama(), tmp_path / "lora_", "lora_").eval()
    assert torch.equal(logits(again), logits(model))
