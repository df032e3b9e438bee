# SPDX-License-Identifier: Apache-2.0
"""Configs against the reference: the same fields with the same defaults, and the same default targets."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import pytest

from graftlet.registry import Entry, default_targets, entries

from .reference import peft

ENTRIES = [pytest.param(e, id=e.name.lower()) for e in entries()]


NEEDED: dict[str, dict[str, Any]] = {
    "TRAINABLE_TOKENS": {"token_indices": [1]},
    "IA3": {"feedforward_modules": ["v"]},
    "ADALORA": {"total_step": 9},
    "CPT": {"task_type": "CAUSAL_LM"},
    "XLORA": {"hidden_size": 8, "adapters": {"0": "somewhere"}},
}
"""What a config cannot do without."""


def defaults(config: type) -> dict[str, Any]:
    found = {}
    for f in dataclasses.fields(config):
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        found[f.name] = plain(value)
    return found


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.value if isinstance(value, enum.Enum) else value


@pytest.mark.parametrize("entry", ENTRIES)
def test_fields_and_defaults_are_the_references(entry: Entry) -> None:
    theirs = defaults(getattr(peft, entry.config.__name__))
    ours = defaults(entry.config)
    assert ours == theirs


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_saved_config_reads_the_same_in_both(entry: Entry, tmp_path: Any) -> None:
    values = NEEDED.get(entry.name, {})
    names = {f.name for f in dataclasses.fields(entry.config)}
    if "target_modules" in names:
        values = {**values, "target_modules": "v" if entry.name == "ADAPTION_PROMPT" else ["v", "q"]}
    ours = entry.config(**values)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(theirs).__name__ == type(ours).__name__
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = entry.config.from_pretrained(tmp_path / "theirs")
    skip = ("peft_version", "inference_mode")
    first, then = ours.to_dict(), again.to_dict()
    assert {k: v for k, v in first.items() if k not in skip} == {k: v for k, v in then.items() if k not in skip}


@pytest.mark.parametrize("entry", ENTRIES)
def test_default_targets_are_the_references(entry: Entry) -> None:
    kind = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(entry.name)
    theirs = getattr(kind, "target_module_mapping", None)
    if not theirs:
        pytest.skip("the method has no default targets")
    assert {k: comparable(v) for k, v in entry.targets.items()} == {k: comparable(v) for k, v in theirs.items()}


def test_default_feedforward_layers_are_the_references() -> None:
    theirs = peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    ours = default_targets("IA3.feedforward")
    assert {k: comparable(v) for k, v in ours.items()} == {k: comparable(v) for k, v in theirs.items()}


def comparable(names: Any) -> Any:
    return names if isinstance(names, str) else sorted(names)
