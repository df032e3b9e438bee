# SPDX-License-Identifier: Apache-2.0
"""Recipes: what is right is read, what is wrong is named with its line and the nearest right key."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlet.errors import ConfigError, UnknownMethodError
from graftlet.train import locate
from graftlet.train.prepare import adapter_config
from graftlet.train.recipe import load_recipe

RIGHT = """\
output = "out"

[model]
source = "base"

[adapter]
method = "lora"
r = 4
init = "gaussian"

[data]
source = "rows.jsonl"
values.spam = { 0 = "ham" }

[[data.where]]
column = "a"

[[data.where]]
column = "b"

[training]
epochs = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "r.toml"


def complaint(file: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        adapter_config(load_recipe(file, overrides))
    return str(caught.value).replace(str(file), "r.toml")


def test_a_right_recipe_is_read(file: Path) -> None:
    file.write_text(RIGHT)
    recipe = load_recipe(file)
    assert recipe.training.epochs == 2
    assert recipe.adapter.fields == {"r": 4}
    assert [f.column for f in recipe.data.where] == ["a", "b"]
    assert recipe.folder == file.parent
    config = adapter_config(recipe)
    assert (config.r, config.init_lora_weights, str(config.task_type)) == (4, "gaussian", "CAUSAL_LM")  # type: ignore


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs = 2", "epoch = 2", "r.toml:22: training.epoch: there is no such key, did you mean 'epochs'"),
        ("epochs = 2", 'epochs = "two"', "r.toml:22: training.epochs = 'two': Input should be a valid number"),
        ("epochs = 2", "epochs = -1", "r.toml:22: training.epochs = -1: Input should be greater than 0"),
        ("epochs = 2", 'evaluate_every = "day"', "r.toml:22: training.evaluate_every = 'day'"),
        ("epochs = 2", "patience = 2", "r.toml:21: training: patience needs evaluate_every"),
        ('column = "b"', 'colum = "b"', "r.toml:19: data.where.1.colum: there is no such key, did you mean 'column'"),
        ("[training]", "[trainig]", "r.toml:21: trainig: there is no such key, did you mean 'training'"),
        ('source = "base"', "", "r.toml:3: model.source: this key is missing"),
        ("r = 4", "rank = 4", "r.toml:8: adapter.rank: LoraConfig has no such field"),
        ("r = 4", "lora_alph = 4", "r.toml:8: adapter.lora_alph: LoraConfig has no such field, did you mean 'lora_alpha'"),
        ("r = 4", 'r = "four"', "r.toml:8: adapter.r: LoraConfig.r='four' is a str"),
        ("epochs = 2", "epochs = ", "r.toml: this is no TOML: Invalid value (at line 22"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(file: Path, old: str, new: str, said: str) -> None:
    assert said in complaint(file, RIGHT.replace(old, new))


def test_every_wrong_key_is_named_at_once(file: Path) -> None:
    said = complaint(file, RIGHT.replace("epochs = 2", "epoch = 2\nbatch = 1"))
    assert "training.epoch:" in said
    assert "training.batch:" in said


def test_missing_recipe(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(file)


def test_unknown_method(file: Path) -> None:
    file.write_text(RIGHT.replace('"lora"', '"lorra"'))
    with pytest.raises(UnknownMethodError, match="LORA"):
        adapter_config(load_recipe(file))


def test_quantization(file: Path) -> None:
    file.write_text(RIGHT + '[quantization]\nmethod = "nf4"\n')
    table = load_recipe(file, ["quantization.skip=['lm_head']"]).quantization
    assert table is not None
    assert (table.method, table.double, table.compute, table.skip) == ("nf4", True, "auto", ["lm_head"])
    assert "r.toml:24: quantization.method = 'nf3': Input should be 'nf4'" in complaint(
        file, RIGHT + '[quantization]\nmethod = "nf3"\n'
    )
    assert "r.toml:25: quantization.doubel: there is no such key, did you mean 'double'?" in complaint(
        file, RIGHT + '[quantization]\nmethod = "nf4"\ndoubel = true\n'
    )


def test_overrides(file: Path) -> None:
    file.write_text(RIGHT)
    given = ["training.learning_rate=1e-3", "output=runs/a b", "packing=true", "adapter.r=2", 'data.prompt="{a}\\n"']
    recipe = load_recipe(file, given)
    assert recipe.training.learning_rate == 1e-3
    assert recipe.output == "runs/a b"
    assert recipe.training.packing is True
    assert recipe.adapter.fields["r"] == 2
    assert recipe.data.prompt == "{a}\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epoch=3", "command line: epoch: there is no such key, did you mean 'epochs'"),
        ("batch_size=3", "'batch_size' is ambiguous: training.batch_size or evaluation.batch_size"),
        ("training.epoch=3", "command line: training.epoch: there is no such key, did you mean 'epochs'"),
        ("epochs=many", "command line: training.epochs = 'many': Input should be a valid number"),
        ("epochs", "is no override"),
        ("output.x=1", "'output' is no table"),
        ("r=3", "adapter.r=..."),
    ],
)
def test_wrong_overrides(file: Path, override: str, said: str) -> None:
    assert said in complaint(file, RIGHT, (override,))


def test_lines_of_difficult_toml() -> None:
    text = '''a = """
b = 1
[c]
"""
[t."x.y"] # [z]
list = [
  "[no]", # d = 1
  { e = 1 },
]
f.g = 1
[[t.many]]
h = 1
[[t.many]]
[t.many.deep]
i = "#"
'''
    found = locate.key_lines(text)
    assert found[("a",)] == 1
    assert ("b",) not in found
    assert found["t", "x.y", "list"] == 6
    assert found["t", "x.y", "f", "g"] == 10
    assert found["t", "many", 0, "h"] == 12
    assert found["t", "many", 1, "deep", "i"] == 15
    assert locate.line_of(found, ("t", "many", 1, "missing")) == 13
    assert locate.line_of(found, ("q",)) is None
