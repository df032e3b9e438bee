# SPDX-License-Identifier: Apache-2.0
"""Wrong input: a clear error that names the thing, before anything changes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graftlet
from graftlet import LoraConfig, PeftConfig, PeftModel, get_peft_model
from graftlet.errors import (
    AdapterFileError,
    AdapterNameError,
    BaseMismatchWarning,
    ConfigError,
    KeysWarning,
    MergeError,
    NoMatchingPeftModuleError,
    PatternWarning,
    UnknownFieldWarning,
    UnknownMethodError,
    UnsupportedLayerError,
)
from tests.model.test_api import IDS, llama, logits, lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    """A saved adapter for `llama()`."""
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    return tmp_path


def snapshot(model):
    """All that must not change: structure, bits, what learns."""
    bits = {n: t.clone() for n, t in model.state_dict().items()}
    return [n for n, _ in model.named_modules()], bits, {n: p.requires_grad for n, p in model.named_parameters()}


def same(before, model):
    names, bits, flags = snapshot(model)
    return (
        names == before[0]
        and flags == before[2]
        and bits.keys() == before[1].keys()
        and all(torch.equal(bits[n], t) for n, t in before[1].items())
    )


def edit_config(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors, end="lora_A.weight"):
    return next(k for k in sorted(tensors) if k.endswith(end))


# configs


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": "8"}, r"r='8' is a str"),
        ({"r": None}, r"r=None"),
        ({"r": 1.5}, r"r=1.5 is a float"),
        ({"r": True}, r"r=True is a bool"),
        ({"r": 0}, "positive"),
        ({"r": -1}, "positive"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_dropout": -1.0}, "lora_dropout=-1.0"),
        ({"lora_dropout": 2.0}, "lora_dropout=2.0"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"use_dora": "false"}, "use_dora='false'"),
        ({"inference_mode": "no"}, "inference_mode='no'"),
        ({"base_model_name_or_path": 123}, "base_model_name_or_path=123"),
        ({"bias": "sometimes"}, "allowed: none, all, lora_only"),
        ({"task_type": "BOGUS"}, "CAUSAL_LM"),
        ({"init_lora_weights": "bogus"}, "gaussian"),
        ({"target_modules": 5}, "target_modules=5"),
        ({"target_modules": ["a", 3]}, "target_modules"),
        ({"modules_to_save": "head"}, "modules_to_save='head'"),
        ({"rank_pattern": {"a": 0}}, "positive"),
        ({"layers_pattern": "h"}, "without layers_to_transform"),
        ({"target_modules": "a.*", "layers_to_transform": [1]}, "regex"),
        ({"lora_dropot": 0.1}, "did you mean 'lora_dropout'"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(fields, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot be read as JSON"),
        ('{"peft_type": "LORA"', "cannot be read as JSON"),
        ("[1, 2]", "list"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ('{"r": 8}', "no peft_type"),
        ('{"peft_type": null}', "no peft_type"),
    ],
    ids=["empty", "cut", "list", "nested", "not utf-8", "no type", "null type"],
)
def test_a_config_file_that_is_none_is_named(folder, text, match):
    (folder / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(graftlet.PeftError, match=match) as error:
        PeftConfig.from_pretrained(folder)
    assert CONFIG in str(error.value)


def test_an_unknown_method_is_named_with_those_there_are(folder):
    edit_config(folder, peft_type="BOGUS")
    with pytest.raises(UnknownMethodError, match="LORA"):
        PeftConfig.from_pretrained(folder)


def test_unknown_fields_of_a_newer_file_are_named_and_ignored(folder):
    edit_config(folder, use_flux_capacitor=True)
    with pytest.warns(UnknownFieldWarning, match="use_flux_capacitor"):
        assert PeftConfig.from_pretrained(folder).r == 2


def test_a_config_in_lower_case_is_read(folder):
    edit_config(folder, peft_type="lora")
    assert type(PeftConfig.from_pretrained(folder)) is LoraConfig


# targets


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"target_modules": ["qproj"]}, "did you mean 'q_proj'"),
        ({"target_modules": []}, "matches no module"),
        ({"target_modules": "(("}, "no valid regex"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves out every layer"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [99]}, "Blocks there: 0, 1"),
        ({"target_modules": ["input_layernorm"]}, "works on Linear"),
        ({"modules_to_save": ["lm_hed"]}, "did you mean 'lm_head'"),
        ({"target_parameters": ["q_proj.wait"], "target_modules": []}, "no parameter of the model"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_are_named_and_the_model_stays(fields, match):
    model = llama()
    before = snapshot(model)
    with pytest.raises((NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError), match=match):
        get_peft_model(model, lora(**fields))
    assert same(before, model)


def test_no_target_and_no_default_is_said():
    with pytest.raises(ConfigError, match="all-linear"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_an_error_in_the_middle_leaves_nothing_behind():
    model = get_peft_model(llama(), lora())
    before = snapshot(model)
    with pytest.raises(ConfigError):
        model.add_adapter("b", lora(lora_bias=True))
    assert same(before, model)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", lora())


def test_an_idle_pattern_is_said():
    with pytest.warns(PatternWarning, match="nope"):
        get_peft_model(llama(), lora(rank_pattern={"nope": 3}))


# names


@pytest.mark.parametrize("name", ["a/b", "/somewhere", "..", ".", "a.b", "", "x" * 300, "a\0b", "a\\b", 3])
def test_a_name_that_is_no_folder_is_refused(name):
    model = get_peft_model(llama(), lora())
    before = snapshot(model)
    with pytest.raises(AdapterNameError):
        model.add_adapter(name, lora())
    assert same(before, model)


def test_names_that_are_taken_or_unknown(folder):
    model = get_peft_model(llama(), lora())
    before = snapshot(model)
    with pytest.raises(AdapterNameError, match="exists already"):
        model.add_adapter("default", lora())
    get_peft_model(llama(), lora(r=5)).save_pretrained(folder)
    with pytest.raises(AdapterNameError, match="exists already"):
        model.load_adapter(folder, "default")
    with pytest.raises(AdapterNameError, match="exists already, with another config"):
        model.load_adapter(folder, "default", strict=False)
    for act in (model.set_adapter, model.delete_adapter, lambda n: model.merge_adapter([n])):
        with pytest.raises(AdapterNameError, match="did you mean 'default'"):
            act("defalt")
    with pytest.raises(AdapterNameError, match="Present: default"):
        logits(model, adapter_names=["default", "zzz"])
    assert same(before, model)


# files


def _smuggle_layer(t):
    key = first(t).replace("lora_A", "base_layer")
    t[key] = torch.zeros(8, 8)


WRONG = {
    "missing": (lambda t: t.pop(first(t)), "1 missing"),
    "all missing": (lambda t: [t.pop(k) for k in list(t)], "8 missing"),
    "unexpected": (lambda t: t.update({"base_model.model.extra.lora_A.weight": torch.zeros(2, 8)}), "not part of this"),
    "misshaped": (lambda t: t.update({first(t): torch.zeros(3, 8)}), "another shape"),
    "integers": (lambda t: t.update({first(t): torch.zeros(2, 8, dtype=torch.int32)}), "another kind"),
    "nan": (lambda t: t[first(t)].fill_(float("nan")), "NaN or Inf"),
    "inf": (lambda t: t[first(t)].fill_(float("inf")), "NaN or Inf"),
    "smuggled into a layer": (_smuggle_layer, "not part of this"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays(folder, change):
    edit_weights(folder, change[0])
    model = llama()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=change[1]):
        PeftModel.from_pretrained(model, folder)
    assert same(before, model)
    model = get_peft_model(model, lora())
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=change[1]):
        model.load_adapter(folder, "other")
    assert same(before, model)
    assert list(model.peft_config) == ["default"]


def test_a_lenient_load_says_what_it_left_out_and_leaves_no_holes(folder):
    def change(t):
        t.pop(first(t))
        t["base_model.model.extra.lora_A.weight"] = torch.zeros(2, 8)

    edit_weights(folder, change)
    with pytest.warns(KeysWarning, match="1 missing.*1 not part"):
        model = PeftModel.from_pretrained(llama(), folder, strict=False)
    assert not any(t.is_meta for t in model.state_dict().values())
    assert torch.equal(logits(model), logits(model))
    model.merge_and_unload()


def test_a_base_of_another_size_is_refused(folder):
    model = llama(head_dim=8)
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="another shape"):
        PeftModel.from_pretrained(model, folder)
    assert same(before, model)


def test_a_base_of_another_name_is_said(folder):
    edit_config(folder, base_model_name_or_path="someone/else")
    model = llama()
    model.name_or_path = "me/mine"
    with pytest.warns(BaseMismatchWarning, match="someone/else.*me/mine"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0not json at all!", None],
    ids=["empty", "short", "header", "json", "cut"],
)
def test_a_damaged_file_is_named(folder, content):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(AdapterFileError, match=WEIGHTS):
        PeftModel.from_pretrained(llama(), folder)


def test_a_missing_file_or_folder_is_named_with_what_is_there(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=CONFIG):
        PeftModel.from_pretrained(llama(), folder)
    with pytest.raises(AdapterFileError, match="no such folder"):
        PeftModel.from_pretrained(llama(), folder / "nowhere")


def test_a_pickle_is_read_only_when_asked_for(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    adapted = logits(model)
    model.save_pretrained(folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()  # it would hide the newer file
    with pytest.raises(AdapterFileError, match="allow_pickle"):
        PeftModel.from_pretrained(llama(), folder)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder, allow_pickle=True)), adapted)


def test_a_pickle_runs_no_code(folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))

    (folder / WEIGHTS).unlink()
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(llama(), folder, allow_pickle=True)
    assert not (folder / "ran").exists()


def test_a_small_file_cannot_take_much_memory(folder):
    """The config asks for a rank of twenty million; which is refused before anything is made."""
    edit_config(folder, r=20_000_000)
    script = f"""
        import resource
        from tests.model.test_api import llama
        from graftlet import PeftModel
        model = llama()
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        try:
            PeftModel.from_pretrained(model, {str(folder)!r})
        except ValueError as error:
            assert "absurdly more than its base" in str(error)
        else:
            raise SystemExit("loaded")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - limit
        assert grown < 200e6, grown
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_saving_to_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterFileError, match="is a file"):
        get_peft_model(llama(), lora()).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saved_files_can_be_read_by_others(folder):
    assert (folder / WEIGHTS).stat().st_mode & 0o044 == 0o044
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_the_base_cannot_be_set_by_a_file_through_the_low_level_functions(folder):
    model = get_peft_model(llama(), lora())
    base = model.base_model.model.model.norm.weight.clone()
    result = graftlet.set_peft_model_state_dict(model, {"base_model.model.model.norm.weight": torch.zeros(8)})
    assert result.unexpected_keys == ["base_model.model.model.norm.weight"]
    assert torch.equal(model.base_model.model.model.norm.weight, base)


# merging


def test_a_merge_that_is_not_finite_changes_nothing():
    model = get_peft_model(llama(), lora())
    layers = [m for m in model.modules() if type(m).__name__ == "AdaptedLayer"]
    with torch.no_grad():
        layers[-1].lora_A["default"].weight.fill_(float("nan"))
    before = [p.clone() for n, p in model.named_parameters() if "base_layer" in n]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="NaN or Inf"):
            merge()
    after = [p for n, p in model.named_parameters() if "base_layer" in n]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not any(layer.merged for layer in layers)


def test_deleting_what_is_merged_is_refused():
    model = get_peft_model(llama(), lora())
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge before"):
        model.delete_adapter("default")


def test_training_after_a_frozen_load_is_explained_by_the_flags(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    assert not model(input_ids=IDS, labels=IDS).loss.requires_grad
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True, "alora_invocation_tokens": [1]}, "alora_invocation_tokens and use_dora"),
        ({"use_dora": True, "kasa_config": {"beta": 0.1}}, "kasa_config and use_dora|use_dora and kasa_config"),
        ({"velora_config": {"num_groups": 2}, "monteclora_config": {"num_samples": 2}}, "do not go together"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias"),
        ({"kasa_config": {"beta": 0.1}, "init_lora_weights": "pissa"}, "kasa_config does not go with"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "even rank; r=3"),
        ({"r": 4, "rank_pattern": {"q": 3}, "init_lora_weights": "orthogonal"}, "even rank; q=3"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_bits=3; allowed: 2, 4, 8"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter=0"),
        ({"init_lora_weights": "pisa"}, "did you mean 'pissa'"),
    ],
)
def test_options_of_lora_that_do_not_go_together_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        graftlet.LoraConfig(target_modules=["q"], **values)
