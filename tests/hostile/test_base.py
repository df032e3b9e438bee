# SPDX-License-Identifier: Apache-2.0
"""The base that an adapter was saved on, told by a sample of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import graftlet
from graftlet.core import fingerprint
from graftlet.errors import AdapterFileError, BaseMismatchError, BaseMismatchWarning
from tests.hostile.tools import WEIGHTS, rewritten, saved
from tests.model.models import adapted, facts, llama, load, lora, same, save, silent


def other(**changes: Any) -> Any:
    """Another base of the same shapes."""
    model = llama(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def recorded(folder: Path) -> str:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata()[fingerprint.KEY]


def test_another_base_of_the_same_shapes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    base = other()
    before = facts(base)
    with pytest.raises(BaseMismatchError, match="their weights differ in .* places"), silent():
        graftlet.PeftModel.from_pretrained(base, tmp_path, verify_base=True)
    assert same(before, base)
    monkeypatch.setenv("GRAFTLET_STRICT", "1")
    with pytest.raises(BaseMismatchError), silent():
        graftlet.PeftModel.from_pretrained(base, tmp_path)
    assert same(before, base)
    monkeypatch.delenv("GRAFTLET_STRICT")
    model = adapted(other(), lora(target_modules=["v_proj"]))
    before = facts(model)
    with pytest.raises(BaseMismatchError), silent():
        model.load_adapter(tmp_path, "other", verify_base=True)
    assert same(before, model)
    assert list(model.peft_config) == ["default"]
    with pytest.warns(BaseMismatchWarning, match="'LlamaForCausalLM'.*differ.*base-differs"):
        model.load_adapter(tmp_path, "other")


def test_a_head_that_the_adapter_brings_is_not_of_the_base(tmp_path: Path) -> None:
    save(adapted(llama(), lora(target_modules=["v_proj"], modules_to_save=["lm_head"])), tmp_path)
    base = llama()
    with torch.no_grad():
        base.lm_head.weight.normal_()
    graftlet.PeftModel.from_pretrained(base, tmp_path, verify_base=True)
    with torch.no_grad():
        base = llama()
        base.model.norm.weight.normal_()
        base.model.embed_tokens.weight.normal_()
    with pytest.raises(BaseMismatchError, match="their weights differ"), silent():
        graftlet.PeftModel.from_pretrained(base, tmp_path, verify_base=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path)
    graftlet.PeftModel.from_pretrained(llama().to(dtype), tmp_path, verify_base=True)
    assert not fingerprint.taken(llama()).difference(fingerprint.taken(llama().to(dtype)))


@pytest.mark.parametrize(
    "values",
    [{}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"use_dora": True}],
    ids=str,
)
def test_the_base_is_what_it_was_before_its_adapters(values: dict[str, Any], tmp_path: Path) -> None:
    """Some starts move a part of it into the adapter, merging changes it, and other adapters stand on it."""
    with silent():
        model = graftlet.get_peft_model(llama(), lora(**values))
    taken = fingerprint.taken(llama()).text()
    save(model, tmp_path)
    assert recorded(tmp_path) == taken
    model.merge_adapter()
    with silent():
        model.save_pretrained(tmp_path)
    assert recorded(tmp_path) == taken
    again = graftlet.PeftModel.from_pretrained(llama(), tmp_path, verify_base=True)
    with silent():
        again.load_adapter(tmp_path, "second", verify_base=True) if values.get("bias") != "all" else None


def test_a_resized_vocabulary_is_not_another_base(tmp_path: Path) -> None:
    saved(tmp_path)
    base = llama()
    base.resize_token_embeddings(13)
    assert not fingerprint.taken(llama()).difference(fingerprint.taken(base))


def test_other_layers_are_told(tmp_path: Path) -> None:
    deeper = fingerprint.taken(llama(num_hidden_layers=4))
    assert "layers differ" in fingerprint.taken(llama()).difference(deeper)


def test_a_file_that_records_no_base_cannot_be_verified(tmp_path: Path) -> None:
    rewritten(saved(tmp_path), lambda tensors: None)  # as another library writes it
    load(llama(), tmp_path)
    with pytest.raises(BaseMismatchError, match="does not record its base"):
        load(llama(), tmp_path, verify_base=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"layers": 1}',
        '{"layers": "a", "sample": {"b": ["x"]}}',
        "[" * 10_000,
        '{"layers":"a","sample":7}',
    ],
)
def test_a_record_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(AdapterFileError, match="damaged"):
        fingerprint.parsed(text, "a file")


def test_it_is_small_whatever_the_model(tmp_path: Path) -> None:
    text = fingerprint.taken(llama(num_hidden_layers=12, hidden_size=64, intermediate_size=256)).text()
    assert len(text) < 6000
    assert len(json.loads(text)["sample"]) == fingerprint.TENSORS


def test_the_other_formats_of_the_field_are_left_alone(tmp_path: Path) -> None:
    """Another reader finds nothing new but metadata."""
    saved(tmp_path)
    assert "fingerprint" not in (tmp_path / "adapter_config.json").read_text()
