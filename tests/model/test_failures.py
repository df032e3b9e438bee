# SPDX-License-Identifier: Apache-2.0
"""What users of the field meet, beyond `test_bad_input`: each ends in a clear word, and the model as it was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftlet
from graftlet.errors import (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    GraftletError,
    HeadWarning,
    KeysWarning,
    MergeWarning,
    NoMatchingPeftModuleError,
    PatternWarning,
)
from tests.model.models import (
    IDS,
    Net,
    adapted,
    bert,
    facts,
    gpt2,
    learning,
    llama,
    load,
    logits,
    lora,
    same,
    save,
    silent,
)

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter for `llama()`."""
    save(adapted(llama(), lora(init_lora_weights=False)), tmp_path)
    return tmp_path


def edited(folder: Path, **fields: Any) -> Path:
    """Other settings for the same tensors, without what tells that they are not of one save."""
    path = folder / CONFIG
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def refused(model: Any, act: Callable[[], object], error: type[Exception], message: str) -> None:
    """An act fails with these words, and the model is as it was."""
    before = facts(model)
    with pytest.raises(error, match=message), silent():
        act()
    assert same(before, model)


# configs that fit no model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**12}, "GiB"),
        ({"rank_pattern": {"((": 3}}, r"rank_pattern has '\(\(', which is no valid regex"),
        ({"alpha_pattern": {"((": 3}}, "alpha_pattern"),
        ({"exclude_modules": "(("}, "exclude_modules"),
        ({"layers_to_transform": [0], "layers_pattern": "(("}, "layers_pattern"),
        ({"layers_to_transform": [0, 99]}, "has 99.*Blocks there: 0, 1, 2"),
        ({"modules_to_save": ["lm_head", "nope"]}, "'nope'"),
        ({"target_modules": ["q_proj", "norm"]}, "works on Linear"),
        ({"lora_bias": True}, "has no bias"),
        ({"rank_pattern": {"2.self_attn.q_proj": 10**12}}, "GiB"),
        ({"trainable_token_indices": [99]}, "from 0 up"),
    ],
    ids=str,
)
def test_a_config_that_fits_no_model_changes_nothing(values: dict[str, Any], message: str) -> None:
    base = llama()
    refused(base, lambda: graftlet.get_peft_model(base, lora(**values)), GraftletError, message)
    refused(base, lambda: graftlet.inject_adapter_in_model(lora(**values), base), GraftletError, message)
    model = adapted(base, lora())
    refused(model, lambda: model.add_adapter("other", lora(**values)), GraftletError, message)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", lora())


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_alpha"):
        lora(lora_alpha=1e40)


def test_a_second_wrapper_cannot_take_a_name_that_stands_in_the_layers() -> None:
    base = llama()
    model = adapted(base, lora())
    refused(base, lambda: graftlet.get_peft_model(base, lora()), AdapterNameError, "'default' exists already")
    refused(model, lambda: graftlet.get_peft_model(model, lora()), AdapterNameError, "'default' exists already")


# files of another model


def test_a_file_of_another_depth_is_refused(folder: Path) -> None:
    for blocks, message in ((4, "2 missing"), (2, "2 not part of this adapter")):
        base = llama(num_hidden_layers=blocks)
        refused(base, lambda base=base: load(base, folder), AdapterFileError, message)


def test_a_file_of_another_architecture_is_refused(folder: Path) -> None:
    base = gpt2()
    refused(base, lambda: load(base, folder), NoMatchingPeftModuleError, "q_proj")


def test_a_classifiers_file_is_no_language_models(tmp_path: Path) -> None:
    save(adapted(bert(), lora(target_modules=["query"], task_type="SEQ_CLS")), tmp_path)
    edited(tmp_path, target_modules=["q_proj"])
    base = llama()
    refused(base, lambda: load(base, tmp_path), AdapterFileError, "not part of this adapter")
    with pytest.warns(HeadWarning), pytest.raises(AdapterFileError):
        graftlet.PeftModel.from_pretrained(base, tmp_path)


def test_targets_that_half_match_are_told_and_the_rest_is_not_dropped(folder: Path) -> None:
    edited(folder, target_modules=["q_proj", "nothing"])
    with pytest.warns(PatternWarning, match="'nothing'"):
        graftlet.PeftModel.from_pretrained(llama(), folder)
    edited(folder, target_modules=["layers.0.self_attn.q_proj", "nothing"])
    base = llama()
    refused(base, lambda: load(base, folder), AdapterFileError, "4 not part of this adapter")


@pytest.mark.parametrize(
    "key", ["base_model.model.lm_head.weight", "base_model.model.model.norm.weight", "lm_head.weight"]
)
def test_base_weights_cannot_be_smuggled_in(folder: Path, key: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, key: torch.full((11, 8) if "lm_head" in key else (8,), 7.0)}, folder / WEIGHTS)
    base = llama()
    if (
        key == "base_model.model.lm_head.weight"
    ):  # embeddings may go with an adapter; what a file brings, it brings openly
        assert load(base, folder).base_model.model.lm_head.weight.eq(7).all()
        return
    refused(base, lambda: load(base, folder), AdapterFileError, "not part of this adapter")
    with pytest.warns(KeysWarning, match="not part"):
        model = graftlet.PeftModel.from_pretrained(base, folder, strict=False)
    assert not model.base_model.model.model.norm.weight.eq(7).any()
    assert not model.base_model.model.lm_head.weight.eq(7).any()


def test_a_lenient_load_leaves_no_tensor_without_memory(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    with pytest.warns(KeysWarning, match="6 missing"):
        model = graftlet.PeftModel.from_pretrained(llama(), folder, strict=False)
    assert not any(t.is_meta for t in model.state_dict().values())
    assert logits(model).equal(logits(llama()))
    save(model, folder)


def test_the_low_level_functions_say_what_does_not_fit() -> None:
    model = adapted(llama(), lora())
    tensors = graftlet.get_peft_model_state_dict(model)
    key = next(iter(tensors))
    before = facts(model)
    result = graftlet.set_peft_model_state_dict(model, {"other.lora_A.weight": torch.zeros(1)})
    assert (len(result.missing_keys), result.unexpected_keys) == (6, ["other.lora_A.weight"])
    with pytest.raises(AdapterFileError, match="of another shape"):
        graftlet.set_peft_model_state_dict(model, {key: torch.zeros(3, 3)})
    with pytest.raises(AdapterNameError, match="Present: default"):
        graftlet.set_peft_model_state_dict(model, tensors, adapter_name="nope")
    assert same(before, model)


# files and folders


def test_a_pickle_saved_over_an_older_file_is_the_one_that_is_read(folder: Path) -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    save(model, folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()
    base = llama()
    refused(base, lambda: load(base, folder), AdapterFileError, "allow_pickle=True")
    assert logits(load(base, folder, allow_pickle=True)).equal(logits(model))
    torch.save([torch.zeros(1)], folder / PICKLE)
    with pytest.raises(AdapterFileError, match="does not hold a dictionary of tensors"):
        load(llama(), folder, allow_pickle=True)


def test_a_damaged_file_is_not_passed_over_for_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).write_bytes(b"\0" * 64)
    base = llama()
    refused(base, lambda: load(base, folder, allow_pickle=True), AdapterFileError, WEIGHTS)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named_beside_what_is_there(folder: Path, name: str) -> None:
    (folder / name).unlink()
    base = llama()
    refused(base, lambda: load(base, folder), AdapterFileError, f"can't find '{name}'.*README.md")
    (folder / name).mkdir()
    refused(base, lambda: load(base, folder), AdapterFileError, f"can't find '{name}'")


def test_a_save_that_cannot_be_leaves_the_files_alone(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = adapted(llama(), lora())
    model.peft_config["default"].rank_pattern = {"q_proj": object()}
    with pytest.raises(TypeError):
        model.save_pretrained(folder)
    with pytest.raises(AdapterNameError, match="Present: default"):
        model.save_pretrained(folder, selected_adapters=["nope"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_that_moved_still_loads(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, ignore=shutil.ignore_patterns("moved"))
    assert logits(load(llama(), moved)).equal(logits(load(llama(), folder)))


# lifecycle


def test_merging_twice_is_told_and_changes_nothing() -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(MergeWarning, match="nothing to unmerge"):
        model.unmerge_adapter()
    model.merge_adapter()
    before = facts(model)
    with pytest.warns(MergeWarning, match="merged already"):
        model.merge_adapter()
    assert same(before, model)
    model.add_adapter("other", lora())
    with pytest.warns(MergeWarning, match="unmerged to activate other"):
        model.set_adapter("other")
    assert all(plain[k].equal(v) for k, v in model.state_dict().items() if k in plain)


def test_a_list_of_adapters_is_set_or_refused_whole() -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    refused(model, lambda: model.set_adapter(["default", "nope"]), AdapterNameError, "'nope'")
    model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]


def test_an_adapter_of_another_config_is_not_loaded_over(folder: Path) -> None:
    model = load(llama(), folder)
    edited(folder, lora_alpha=99)
    refused(model, lambda: model.load_adapter(folder, "default"), AdapterNameError, "'default' exists already")
    told = "lora_alpha=4, and 99 in the file"
    refused(model, lambda: model.load_adapter(folder, "default", strict=False), AdapterNameError, told)
    model.delete_adapter("default")
    model.load_adapter(folder, "default")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 99 / 2


def test_a_checkpoint_is_loaded_into_its_adapter(folder: Path, tmp_path: Path) -> None:
    model = load(llama(), folder, is_trainable=True)
    before, wanted = dict(model.named_parameters()), logits(model)
    model.save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        for name, parameter in before.items():
            if "lora_" in name:
                parameter.add_(1)
    flags = {name: parameter.requires_grad for name, parameter in before.items()}
    result = model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert logits(model).equal(wanted)
    now = dict(model.named_parameters())
    assert all(now[name] is before[name] for name in before)  # an optimizer goes on with them
    assert {name: parameter.requires_grad for name, parameter in now.items()} == flags


def test_without_its_last_adapter_a_model_is_its_base() -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    model.delete_adapter("default")
    assert logits(model).equal(logits(llama()))
    assert not [k for k in model.state_dict() if "lora" in k]
    with pytest.raises(AdapterNameError, match="no adapter any more"):
        model.save_pretrained("nowhere")
    model.add_adapter("new", lora(init_lora_weights=False))
    assert model.active_adapters == ["new"]
    assert not logits(model).equal(logits(llama()))


@pytest.mark.parametrize("values", [{}, {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}], ids=str)
def test_a_load_that_fails_half_way_leaves_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    save(adapted(llama(), lora(**values)), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    last = sorted(tensors)[-1]
    save_file({**tensors, last: torch.full_like(tensors[last], float("nan"))}, tmp_path / WEIGHTS)
    base = llama()
    base.lm_head.weight.requires_grad_(False)
    refused(base, lambda: load(base, tmp_path), AdapterFileError, "NaN or Inf")
    model = adapted(base, lora(target_modules=["v_proj"]))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    refused(model, lambda: model.load_adapter(tmp_path, "other"), AdapterFileError, "NaN or Inf")
    assert learning(model) >= {"base_model.model.model.norm.weight"}
    assert list(model.peft_config) == ["default"]


def test_rows_that_do_not_match_the_batch_are_refused() -> None:
    model = adapted(llama(), lora())
    for names, message in ((["default"], "1 entries for a batch of 2"), (["default", "nope"], "'nope'")):
        refused(model, lambda names=names: model(IDS, adapter_names=names), GraftletError, message)


def test_plain_modules_are_treated_alike(tmp_path: Path) -> None:
    net = Net()
    refused(net, lambda: graftlet.get_peft_model(net, lora()), NoMatchingPeftModuleError, "a, b, head")
    model = adapted(net, lora(target_modules=["a", "b"], modules_to_save=["head"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    save(model, tmp_path)
    x = torch.randn(3, 4)
    assert load(Net(), tmp_path)(x).equal(twin(x))
