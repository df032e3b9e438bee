# SPDX-License-Identifier: Apache-2.0
"""Which layers a config means, what is saved whole, and which biases learn: as in the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graftlet
from graftlet.errors import HeadWarning, PatternWarning
from tests.model.models import (
    IDS,
    Build,
    Net,
    adapted,
    bert,
    gpt2,
    learning,
    llama,
    load,
    logits,
    lora,
    move,
    save,
    silent,
    t5,
)  # fmt: skip

peft = pytest.importorskip("peft")

MODELS = [llama, gpt2, bert, t5]
NAMES = ["q_proj", "query", "c_attn", "q"]
CASES: dict[str, dict[str, Any]] = {
    "defaults": {"target_modules": None},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear-classifier": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "bias-all": {"bias": "all"},
    "bias-of-adapted": {"bias": "lora_only"},
    "bias-and-copy": {"bias": "all", "modules_to_save": ["dense", "mlp"]},
    "excluded-names": {"exclude_modules": ["0.self_attn.q_proj", "0.attention.self.query", "0.attn.c_attn"]},
    "excluded-regex": {"exclude_modules": r".*\.0\..*"},
    "one-block": {"layers_to_transform": 1},
    "blocks": {"layers_to_transform": [0, 1]},
    "blocks-of": {"layers_to_transform": [1], "layers_pattern": ["layer", "layers", "h"]},
    "regex": {"target_modules": r".*\.1\..*\.(q_proj|query|c_attn|q)"},
    "patterns": {"rank_pattern": {r"1\..*": 3}, "alpha_pattern": {r"0\..*": 5}},
    "embeddings": {"target_modules": ["wte", "shared", "word_embeddings", *NAMES]},
    "copies": {"modules_to_save": ["mlp", "classifier", "wo"]},
}  # fmt: skip


def config(lib: Any, build: Build, case: str) -> Any:
    values = {"target_modules": NAMES, **CASES[case]}
    if "modules_to_save" in values:  # the reference takes names that match nothing; Graftlet takes them for slips
        there = {part for name, _ in build().named_modules() for part in name.split(".")}
        values["modules_to_save"] = [n for n in values["modules_to_save"] if n in there]
    return lora(lib, **values)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", MODELS)
def test_the_same_layers_are_adapted(build: Build, case: str) -> None:
    theirs, ours = adapted(build(), config(peft, build, case), peft), adapted(build(), config(graftlet, build, case))
    assert set(theirs.state_dict()) == set(ours.state_dict())
    assert learning(theirs) == learning(ours)
    assert theirs.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    with silent():
        theirs_saved, ours_saved = peft.get_peft_model_state_dict(theirs), graftlet.get_peft_model_state_dict(ours)
    twice = (".original_module.", ".modules_to_save.")  # the reference writes the biases of copies three times
    wanted = {k: v.shape for k, v in theirs_saved.items() if not any(level in k for level in twice)}
    assert wanted == {k: v.shape for k, v in ours_saved.items()}


@pytest.mark.parametrize(("case", "blocks"), [("defaults", 3), ("all-linear", 3), ("all-linear", 6), ("regex", 3)])
def test_a_saved_config_names_the_layers(case: str, blocks: int, tmp_path: Path) -> None:
    found = []
    for lib in (peft, graftlet):
        save(adapted(llama(num_hidden_layers=blocks), lora(lib, **CASES[case]), lib), tmp_path)
        targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        found.append(targets if isinstance(targets, str) else sorted(targets))
    assert found[0] == found[1]


def test_names_that_match_nothing_are_told() -> None:
    with pytest.warns(PatternWarning, match="'nothing'"):
        graftlet.get_peft_model(llama(), lora(target_modules=["q_proj", "nothing"]))
    with pytest.warns(PatternWarning, match=r"'qproj'.*did you mean 'q_proj'"):
        graftlet.get_peft_model(llama(), lora(target_modules=["v_proj", "qproj"]))
    with pytest.warns(HeadWarning, match="classifier or score"):
        graftlet.get_peft_model(Net(), lora(target_modules=["a"], task_type="SEQ_CLS"))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("build", [bert, gpt2])
def test_trained_biases_go_both_ways(build: Build, bias: str, tmp_path: Path) -> None:
    for here, there in ((peft, graftlet), (graftlet, peft), (graftlet, graftlet)):
        model = adapted(build(), lora(here, target_modules=NAMES, bias=bias), here)
        move(model)
        save(model, tmp_path)
        assert logits(load(build(), tmp_path, there)).allclose(logits(model), atol=1e-6)
    assert not logits(model).equal(logits(build()))


def test_biases_beside_copies_go_both_ways(tmp_path: Path) -> None:
    values: dict[str, Any] = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    for here, there in ((peft, graftlet), (graftlet, peft), (graftlet, graftlet)):
        model = adapted(bert(), lora(here, **values), here)
        move(model)
        save(model, tmp_path)
        assert logits(load(bert(), tmp_path, there)).allclose(logits(model), atol=1e-6)


def test_only_one_adapter_trains_the_biases() -> None:
    model = adapted(llama(), lora(bias="all"))
    with pytest.raises(graftlet.GraftletError, match="only one adapter"):
        model.add_adapter("other", lora(bias="lora_only"))
    assert list(model.peft_config) == ["default"]


def test_copies_of_several_adapters(tmp_path: Path) -> None:
    model = adapted(bert(), lora(target_modules=["query"], modules_to_save=["classifier"]))
    move(model)
    first = logits(model)
    model.add_adapter("other", lora(target_modules=["query"], modules_to_save=["classifier"]))
    model.add_adapter("plain", lora(target_modules=["query"]))
    model.set_adapter("other")
    move(model, 1.0)
    second = logits(model)
    mixed = model(adapter_names=["other", "default"], input_ids=IDS).logits
    assert mixed[0].allclose(second[0], atol=1e-6)
    assert mixed[1].allclose(first[1], atol=1e-6)
    save(model, tmp_path)
    assert logits(load(bert(), tmp_path / "other", peft)).allclose(second, atol=1e-6)
    again = load(bert(), tmp_path)
    with silent():
        again.load_adapter(tmp_path / "other", "other")
    assert logits(again).equal(first)
    again.set_adapter("other")
    assert logits(again).equal(second)
    model.set_adapter("plain")
    assert logits(model).equal(logits(bert()))
    model.set_adapter("other")
    model.delete_adapter("other")
    assert logits(model).equal(first)
    assert type(model.merge_and_unload().classifier).__name__ == "Linear"
