# SPDX-License-Identifier: Apache-2.0
"""`graftlet plan` and `graftlet train --dry-run`: a recipe's cost, told before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import graftlet
from graftlet.cli import main
from graftlet.cli._plan import duration, size
from graftlet.errors import ConfigError
from graftlet.knowledge.cost.recipe import estimate_recipe
from graftlet.train.base import load_base
from graftlet.train.prepare import adapter_config
from graftlet.train.recipe import load_recipe

from ..train import tiny

RECIPE = """
output = "{folder}/out"
title = "sums"
[model]
source = "{base}"
dtype = "float32"
device = "cpu"
threads = 1
[adapter]
r = 4
target_modules = ["q_proj", "v_proj"]
[data]
source = "none.jsonl"
max_length = 64
[training]
batch_size = 4
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    base = tiny.save(folder / "base")
    file = folder / "r.toml"
    file.write_text(RECIPE.format(folder=folder, base=base))
    return file


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["graftlet", *words])
    try:
        main()
    except SystemExit as end:
        if end.code:
            return capsys.readouterr().err
    return capsys.readouterr().out


def test_a_recipe_says_what_it_takes(recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(capsys, monkeypatch, "plan", str(recipe), "--device", "H100")
    assert "memory at the peak" in text
    assert "gradient_checkpointing" in text
    assert "fits" in text
    assert "data-parallel" in text
    assert not (recipe.parent / "out").exists()


def test_json_is_the_estimate(recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(
        told(capsys, monkeypatch, "plan", str(recipe), "training.batch_size=8", "--device", "H100", "--json")
    )
    again = estimate_recipe(load_recipe(recipe, ["training.batch_size=8"]), "H100")
    assert found["memory"]["peak"] == again.peak
    assert sum(v for k, v in found["memory"].items() if k != "peak") == again.peak
    assert found["batch"] == 8
    assert found["sequence"] == 64
    assert {lever["name"] for lever in found["levers"]} >= {"checkpointing", "batch"}
    assert found["sent"]["2"]["adapter"] == again.gradient_bytes


def test_a_dry_run_trains_nothing(recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(capsys, monkeypatch, "train", str(recipe), "--dry-run")
    assert "memory at the peak" in text
    assert not (recipe.parent / "out").exists()


def test_as_many_numbers_learn_as_in_the_run(recipe: Path) -> None:
    checked = load_recipe(recipe)
    model: Any = graftlet.get_peft_model(load_base(str(recipe.parent / "base"), checked.model), adapter_config(checked))
    found = estimate_recipe(checked, "H100")
    assert (found.trainable, found.parameters) == model.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.mixed_precision=bf16", "mixed_precision = 'bf16': a step under autocast"),
        ("training.optimizer=lomo", "optimizer = 'lomo'"),
        ("model.source=./nowhere", "no config of a model"),
    ],
)
def test_what_cannot_be_foretold_is_said_with_its_place(recipe: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        estimate_recipe(load_recipe(recipe, [override]), "H100")


def test_keys_of_a_recipe_are_all_meant(recipe: Path) -> None:
    def peak(*overrides: str) -> int:
        return estimate_recipe(load_recipe(recipe, list(overrides)), "H100").peak

    plain = peak()
    assert peak("training.batch_size=16") > plain
    assert peak("data.max_length=128") > plain
    assert peak("training.gradient_checkpointing=true") < plain
    assert peak("training.packing=true") < plain  # no mask of rows that differ in length
    assert peak("model.attention=eager") > plain
    assert peak('quantization.method="int8"') != plain
    assert estimate_recipe(load_recipe(recipe, ["training.optimizer=sgd"]), "H100").memory.optimiser == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1500, "1.5 kB"), (27_850_000_000, "27.85 GB"), (2_500_000, "2.5 MB")]
)
def test_sizes_for_people(value: int, text: str) -> None:
    assert size(value) == text


def test_durations_for_people() -> None:
    assert (duration(0.1755), duration(2.5)) == ("176 ms", "2.5 s")
