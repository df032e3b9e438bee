# SPDX-License-Identifier: Apache-2.0
"""Adapters that the reference wrote, kept in the repository: they load with equal outputs, and are saved the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftlet import PeftModel

HERE = Path(__file__).parent
FOLDERS = sorted(p.parent for p in HERE.glob("peft-*/*/adapter_config.json"))


@pytest.fixture
def base():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(HERE / "base").eval()


@pytest.fixture(params=FOLDERS, ids=lambda p: p.name)
def folder(request):
    return request.param


def test_there_are_golden_files():
    assert len(FOLDERS) >= 20


def test_loads_with_equal_outputs(base, folder):
    expected = load_file(folder / "expected.safetensors")
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        call = {k: v for k, v in expected.items() if k not in ("ids", "logits")}
        logits = model(input_ids=expected["ids"], **call).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)


def test_is_saved_the_same_again(base, folder, tmp_path):
    PeftModel.from_pretrained(base, folder).save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, folder))
    shared = {f"base_model.{name}" for name in ("randlora_A", "randlora_B")} & theirs.keys()  # and again at every layer
    theirs = {k: t for k, t in theirs.items() if not k.endswith(".zeros") or t.any()}  # GLoRA's "none"
    theirs = {k: t for k, t in theirs.items() if k in shared or f"base_model.{k.rpartition('.')[2]}" not in shared}
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
    for key, tensor in theirs.items():
        if "_topk_weights" in key:  # by way of logarithms
            torch.testing.assert_close(ours[key], tensor)
        else:
            assert torch.equal(ours[key], tensor), key
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder))
    for config in (ours, theirs):
        config.pop("base_model_name_or_path")
        for name in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])
    assert ours == theirs
