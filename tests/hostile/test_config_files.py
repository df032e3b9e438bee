# SPDX-License-Identifier: Apache-2.0
"""`adapter_config.json` from a stranger: refused with a clear error, before the model changes, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import suppress
from typing import Any

import pytest

import graftlet
from graftlet import PeftConfig
from graftlet.errors import AdapterFileError, ConfigError, GraftletError, UnknownMethodError
from graftlet.registry import entries
from tests.hostile.tools import CONFIG, bounded, configured, refused, saved
from tests.model.models import llama, silent

TEXTS = {
    "empty": b"",
    "cut": b'{"peft_type": "LORA"',
    "a list": b"[1]",
    "a number": b"7",
    "not UTF-8": b"\xff\xfe{}",
    "nested lists": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "a deep field": b'{"peft_type": "LORA", "r": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "twice": b'{"peft_type": "LORA", "r": 8, "r": 9}',
    "a number of many digits": b'{"peft_type": "LORA", "r": ' + b"9" * 6000 + b"}",
    "NaN": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "infinity": b'{"peft_type": "LORA", "lora_alpha": 1e999}',
    "no type": b'{"r": 8}',
    "huge": b'{"peft_type": "LORA", "a": "' + b"x" * (11 * 2**20) + b'"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_config_is_refused_and_named(text: bytes, tmp_path) -> None:
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    message = refused(tmp_path)
    assert "adapter_config" in message or "LoraConfig" in message
    assert len(message) < 2000


@pytest.mark.parametrize(
    "kind", ["BOGUS", "", None, 7, ["LORA"], {"a": 1}, "os.system", "../LORA", "x" * 100_000], ids=lambda k: str(k)[:20]
)
def test_an_unknown_method_is_refused(kind: Any, tmp_path) -> None:
    assert len(refused(configured(saved(tmp_path), peft_type=kind))) < 4000


FIELDS = {
    "r of a thousand million": {"r": 10**9},
    "r of 10^30": {"r": 10**30},
    "negative r": {"r": -1},
    "r is text": {"r": "8"},
    "r is true": {"r": True},
    "r is half": {"r": 1.5},
    "alpha is a list": {"lora_alpha": [1]},
    "a pattern that multiplies": {"rank_pattern": {"q_proj": 10**9}},
    "a pattern of negatives": {"rank_pattern": {"q_proj": -3}},
    "a pattern of text": {"rank_pattern": {"q_proj": "8"}},
    "a pattern of many keys": {"rank_pattern": {f"a{i}": 1 for i in range(150_000)}},
    "many targets": {"target_modules": [f"a{i}" for i in range(50_000)]},
    "targets are numbers": {"target_modules": [1, 2]},
    "targets are a path": {"target_modules": ["/etc/passwd", "../../x"]},
    "targets are a URL": {"target_modules": ["https://example.org/x"]},
    "modules to save are a path": {"modules_to_save": ["/etc/passwd"]},
    "parameters are a path": {"target_parameters": ["../../x"]},
    "a missing block": {"layers_to_transform": [10**9]},
    "blocks for ever": {"layer_replication": [[0, 10**12]]},
    "blocks again and again": {"layer_replication": [[0, 3]] * 20_000},
    "blocks backwards": {"layer_replication": [[3, 0]]},
    "tokens beyond": {"trainable_token_indices": [10**12]},
    "Megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
    "a task that is none": {"task_type": "BOGUS"},
    "a base that is a number": {"base_model_name_or_path": 123},
    "an eva config that is text": {"eva_config": "evil"},
    "a nested config of other fields": {"kasa_config": {"evil": 1}},
    "a nested config of wrong values": {"use_bdlora": {"nblocks": "x"}},
}  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_absurd_values_are_refused(fields: dict[str, Any], tmp_path) -> None:
    assert len(refused(configured(saved(tmp_path), **fields))) < 4000


WRONG = ("text", -7, 10**40, 1.5, float("nan"), True, None, [], [[1]], {"a": {"b": 1}}, ["x" * 1000], {"": ""})


@pytest.mark.parametrize("entry", list(entries()), ids=lambda e: e.name)
def test_no_value_of_any_field_of_any_method_does_more_than_raise(entry: Any) -> None:
    """Each field of each config with values of all kinds: a config, or an error that was raised on purpose."""
    good = json.loads(json.dumps({"peft_type": entry.name}))
    with bounded(), silent():
        for field in dataclasses.fields(entry.config):
            for value in WRONG:
                with suppress(GraftletError):
                    PeftConfig.from_dict({**good, field.name: value})


@pytest.mark.parametrize("name", ["parent_library", "base_model_class"])
def test_nothing_is_imported_because_a_file_names_it(name: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('this code ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    mapping = {"parent_library": "transformers", "base_model_class": "LlamaForCausalLM", name: "evil_module"}
    folder = configured(
        saved(tmp_path / "a"),
        auto_mapping=mapping,
        task_type=None,
        base_model_name_or_path="evil_module",
        megatron_core="evil_module",
    )
    with silent():
        graftlet.PeftModel.from_pretrained(llama(), folder)
        with pytest.raises(GraftletError):
            graftlet.AutoPeftModel.from_pretrained(folder)
    assert "evil_module" not in sys.modules


def test_limits_can_be_raised(tmp_path, monkeypatch) -> None:
    saved(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(path.read_text() + " " * (11 * 2**20))
    with pytest.raises(AdapterFileError, match="MAX_CONFIG_BYTES"):
        PeftConfig.from_pretrained(tmp_path)
    monkeypatch.setattr("graftlet.limits.MAX_CONFIG_BYTES", 12 * 2**20)
    assert PeftConfig.from_pretrained(tmp_path).r == 2


SEEDED = {
    "VERA": {"r": 10**7, "save_projection": False},
    "RANDLORA": {"r": 10**7, "save_projection": False},
    "PVERA": {"r": 10**7, "save_projection": False},
    "TINYLORA": {"u": 10**5, "save_projection": False},
    "UNILORA": {"r": 10**7},
    "VBLORA": {"num_vectors": 10**10, "vector_length": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 10**10},
    "PREFIX_TUNING": {"num_virtual_tokens": 10**9},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 5, "num_tasks": 10**9},
}
"""Methods that make tensors at a load which are not in the file."""


@pytest.mark.parametrize("name", SEEDED)
def test_what_a_method_makes_itself_at_a_load_is_bounded_too(name: str, tmp_path) -> None:
    saved(tmp_path)
    values = {"peft_type": name, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **SEEDED[name]}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    base = llama()
    with bounded(), silent(), pytest.raises((ConfigError, AdapterFileError)):
        graftlet.PeftModel.from_pretrained(base, tmp_path)


def test_the_allowed_methods_are_told(tmp_path) -> None:
    with pytest.raises(UnknownMethodError, match="LORA"):
        PeftConfig.from_pretrained(configured(saved(tmp_path), peft_type="LORAA"))
