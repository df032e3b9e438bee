# SPDX-License-Identifier: Apache-2.0
"""Classification: labels are found in the data, a head for them is trained and saved, and both are there again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graftlet.cli._generate import Settings, generate
from graftlet.errors import CallError, ConfigError
from graftlet.train.classification import Labels, labels_of
from graftlet.train.recipe import check, load_recipe
from graftlet.train.run import Result, train
from graftlet.train.use import classify

from . import tiny
from .test_run import cut_and_resumed

QUIET = Console(quiet=True)
RECIPES = Path(__file__).parents[2] / "examples/recipes"
WORDS = {"yes": 0.5, "no": -1.5, "hm": 0.25}


def rows(label: str = "word") -> list[dict[str, Any]]:
    """A word in the middle of others decides."""
    found = [
        {"text": f"{i % 7} {word} {i % 5}", "word": word, "amount": value}
        for i in range(24)
        for word, value in WORDS.items()
    ]
    return [{"text": r["text"], label: r[label]} for r in found]


def recipe(base: Path, tmp_path: Path, /, given: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows() if given is None else given)
    tables: dict[str, Any] = {
        "task": "classification",
        **tiny.opening(base, tmp_path / "out"),
        "data": {
            "source": str(data),
            "prompt": "{text}",
            "label": "word",
            "dedupe": False,
            "validation": 12,
            "test": 18,
        },
        "training": {"batch_size": 8, "learning_rate": 2e-2, "max_steps": 24, "log_every": 1},
        "evaluation": {"samples": 2},
    }
    return {**tables, **{k: {**tables[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def run(base: Path, tmp_path: Path, /, *callbacks: Any, **changes: Any) -> Result:
    return train(check(recipe(base, tmp_path, **changes)), callbacks, QUIET)


@pytest.fixture(scope="module")
def learnt(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(base, tmp_path_factory.mktemp("labels"), evaluation={"verify": True})


def test_labels_are_learnt_and_are_there_again(learnt: Result) -> None:
    summary = json.loads((learnt.output / "summary.json").read_text())
    assert summary == json.loads(json.dumps(learnt.summary))
    before, after, loaded, merged = summary["measured"]
    assert after["validation_loss"] < 0.5 * before["validation_loss"]
    assert before["metric"] < 0.7 < 0.9 < after["metric"]
    assert (after["right"], after["of"]) == (round(18 * after["metric"]), 18)
    assert loaded == {**after, "stage": loaded["stage"], "same_answers": 18}
    assert merged["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-3)
    assert (summary["data"]["labels"], summary["data"]["outputs"], summary["metric"]) == (
        ["hm", "no", "yes"],
        3,
        "accuracy",
    )
    assert set(summary["data"]["train"]["groups"]) == set(WORDS)
    assert {s["expected"] for s in summary["samples"]} <= set(WORDS)


def test_the_report_tells_of_labels(learnt: Result) -> None:
    page = learnt.report.read_text()
    for words in ("accuracy, held-out", "3 labels: hm, no, yes.", "18 of 18"):
        assert words in page, words


def test_the_saved_adapter_has_the_head(learnt: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTLET_STRICT", "1")  # nothing to warn of: the new head is not taken for another base
    model: Any = learnt.load()
    config = model.get_base_model().config
    assert (config.num_labels, config.id2label) == (3, {0: "hm", 1: "no", 2: "yes"})
    texts = [r["text"] for r in rows()]
    found = classify(learnt.output, texts)
    assert sum(a == r["word"] for a, r in zip(found, rows(), strict=True)) > 0.9 * len(texts)
    assert found == [classify(learnt.output, [text])[0] for text in texts[:4]] + found[4:]  # whatever it is padded to
    assert classify(learnt.output, []) == []


def test_amounts_are_estimated(base: Path, tmp_path: Path) -> None:
    result = run(base, tmp_path, given=rows("amount"), data={"label": "amount"}, training={"max_steps": 40},
                 evaluation={"verify": True})  # fmt: skip
    before, after, loaded, _ = result.summary["measured"]
    assert after["metric"] < 0.3 * before["metric"]
    assert "right" not in after
    assert loaded == {**after, "stage": loaded["stage"], "same_answers": 18}
    assert (result.summary["metric"], result.summary["head"]["num_labels"]) == ("squared_error", 1)
    said = [float(v) for v in classify(result.output, ["1 yes 2", "1 no 2"])]
    assert said == pytest.approx([0.5, -1.5], abs=0.4)
    page = result.report.read_text()
    assert "mean squared error, held-out" in page
    assert "The labels are amounts." in page


def test_the_loss_is_a_mean_over_texts_whatever_the_batches(base: Path, tmp_path: Path) -> None:
    for amounts in (False, True):
        given, data = (rows("amount"), {"label": "amount"}) if amounts else (rows(), {})
        large, small = (
            run(base, tmp_path, given=given, data=data, output=str(tmp_path / f"{amounts}{size}"),
                training={"batch_size": size, "accumulation": 8 // size, "max_steps": 3})
            for size in (8, 2)
        )  # fmt: skip
        losses = [r.summary["measured"][1]["validation_loss"] for r in (large, small)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_resuming_ends_where_the_whole_run_does(base: Path, tmp_path: Path) -> None:
    every = {"save_every": 2, "evaluate_every": 2, "max_steps": 7, "warmup": 0.3}
    whole, resumed = cut_and_resumed(partial(run, base, tmp_path), tmp_path, 5, every)
    assert resumed.summary["measured"] == whole.summary["measured"]


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
        {"method": "ia3", "target_modules": ["v_proj"], "feedforward_modules": []},
        {"method": "lora", "r": 2, "target_modules": ["q_proj"], "init": "eva"},
    ],
    ids=str,
)
def test_other_methods_learn_with_a_head_too(base: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    tables = recipe(base, tmp_path, training={"max_steps": 8}, evaluation={"verify": True})
    result = train(check({**tables, "adapter": adapter}), (), QUIET)
    before, after, loaded, *_ = result.summary["measured"]
    assert after["validation_loss"] < before["validation_loss"]
    assert loaded["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["spam", "ham", "spam"], ("ham", "spam")),
        (["10", "2", "1"], ("1", "2", "10")),
        (["1", "two"], ("1", "two")),
        (["1", "0.5"], ()),
        (["0.5", "0.5"], ()),
        (["True", "False"], ("False", "True")),
    ],
)
def test_what_the_labels_are(texts: list[str], names: tuple[str, ...]) -> None:
    assert labels_of(texts) == Labels(names)


def test_what_scores_stand_for() -> None:
    labels = Labels(("1", "2", "10"))
    assert [labels.target(t) for t in ("1", "2", "10")] == [0, 1, 2]
    assert labels.told(torch.tensor([[0.0, 0.1, 9.0], [1.0, 0.0, 0.0]])) == ["10", "1"]
    assert Labels(()).target("0.5") == 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"text": "a", "word": "x"}] * 40, "data.label: all rows have the label 'x'"),
        ([{"text": str(i), "word": [None, "x"][i % 2]} for i in range(40)], "data.label: a row has no label"),
        ([{"text": str(i), "word": [1.5, float("inf")][i % 2]} for i in range(40)], "data.label: labels that are amounts must"),
        ([{"text": str(i), "wort": "x"} for i in range(40)], "data.label: the data has no column 'word'"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learnt(base: Path, tmp_path: Path, given: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(base, tmp_path, given=given)
    assert said in str(caught.value)


RIGHT = """\
output = "out"
task = "classification"
[model]
source = "base"
[data]
source = "rows.jsonl"
label = "word"
[adapter]
r = 4
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('label = "word"', "", "r.toml:5: data.label: task = 'classification' needs data.label: the column of the labels"),
        ('"classification"', '"sft"', "r.toml:7: data.label: this key is for task = 'classification', not for 'sft'"),
        ('"word"', '"word"\ncompletion = "{a}"', "r.toml:8: data.completion: this key is for task = 'sft'"),
        ('"word"', '"word"\nrejected = "{a}"', "r.toml:8: data.rejected: this key is for task = 'dpo'"),
        ("[adapter]", "[training]\npacking = true\n[adapter]", "r.toml:9: training.packing: this key is for"),
        ("[adapter]", '[evaluation]\nmetric = "exact_match"\n[adapter]', "r.toml:9: evaluation.metric: this key is"),
        ("r = 4", 'task_type = "CAUSAL_LM"', "r.toml:9: adapter.task_type: task = 'classification' makes SEQ_CLS adapters"),
        ('"classification"', '"clasification"', "r.toml:2: task = 'clasification': Input should be 'sft'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(RIGHT.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert said in str(caught.value)


def test_generate_says_what_to_use_in_its_place(learnt: Result) -> None:
    with pytest.raises(CallError, match=r"for SEQ_CLS, which writes no text; in Python, graftlet.train.classify"):
        generate(str(learnt.output), ["a"], Settings(4, 0.0, 0, True, None, False))


def test_classify_wants_a_run_of_its_task(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="no run of a recipe"):
        classify(tmp_path, ["a"])


def test_the_shipped_recipe_is_right() -> None:
    assert load_recipe(RECIPES / "spam-classifier.toml").data.label == "spam"
