# SPDX-License-Identifier: Apache-2.0
"""Embeddings: texts that belong together come to be near, through sentence-transformers, and vectors are there again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftlet import LoraConfig
from graftlet.cli._generate import Settings, generate
from graftlet.errors import CallError, ConfigError, DependencyError
from graftlet.train.embedding import SENTENCES, load_sentences
from graftlet.train.recipe import ModelTable, check, load_recipe
from graftlet.train.run import Result, train
from graftlet.train.use import sentences

from . import tiny
from .test_run import cut_and_resumed

QUIET = Console(quiet=True)
RECIPES = Path(__file__).parents[2] / "examples/recipes"
needs = pytest.mark.skipif(not SENTENCES.met, reason=SENTENCES.command)


def recipe(base: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A number belongs to the same one in brackets."""
    rows = [{"a": f"{i * 37 % 101} {i}", "b": f"({i * 37 % 101} {i})", "c": f"({i * 41 % 101} {i})"} for i in range(60)]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    tables: dict[str, Any] = {
        "task": "embedding",
        **tiny.opening(base, tmp_path / "out"),
        "data": {"source": str(data), "prompt": "{a}", "completion": "{b}", "validation": 8, "test": 16},
        "training": {"batch_size": 8, "learning_rate": 1e-2, "max_steps": 16, "log_every": 1},
        "evaluation": {"samples": 2},
    }
    return {**tables, **{k: {**tables[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def run(base: Path, tmp_path: Path, *callbacks: Any, **changes: Any) -> Result:
    return train(check(recipe(base, tmp_path, **changes)), callbacks, QUIET)


@needs
@pytest.mark.parametrize("negative", [None, "{c}"])
def test_what_belongs_together_comes_to_be_near(base: Path, tmp_path: Path, negative: str | None) -> None:
    result = run(base, tmp_path, evaluation={"verify": True}, data={"rejected": negative})
    before, after, loaded, merged = result.summary["measured"]
    assert after["validation_loss"] < before["validation_loss"]
    assert after["metric"] > before["metric"]
    assert (result.summary["metric"], after["of"]) == ("recall", 16)
    assert loaded == {**after, "stage": loaded["stage"], "same_answers": 16}
    assert merged["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-3)
    assert "recall at 1, held-out" in result.report.read_text()
    whole = sentences(result.output)
    texts = [e["prompt"] for e in result.summary["samples"]]
    vectors = whole.encode(texts)
    assert (
        abs(whole.encode(texts) - load_sentences(str(base), ModelTable(source="", dtype="float32")).encode(texts)).max()
        > 1e-3
    )
    theirs = load_sentences(str(base), ModelTable(source="", dtype="float32"))
    theirs.load_adapter(str(result.output))  # by the reference
    assert abs(theirs.encode(texts) - vectors).max() < 1e-4


@needs
def test_resuming_ends_where_the_whole_run_does(base: Path, tmp_path: Path) -> None:
    cut_and_resumed(partial(run, base, tmp_path), tmp_path, 3, {"save_every": 2, "max_steps": 6})


@pytest.mark.skipif(SENTENCES.met, reason="sentence-transformers is installed")
def test_without_sentence_transformers_the_command_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match='pip install "sentence-transformers>=6.2,<7"'):
        run(base, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"chat": True}}, "data.chat: this key is for task = 'sft'"),
        ({"quantization": {"method": "nf4"}}, "quantization: this key is for task = 'sft'"),
        ({"data": {"label": "a"}}, "data.label: this key is for task = 'classification', not for 'embedding'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    tables = recipe(base, tmp_path)
    for name, value in changes.items():
        tables[name] = {**tables.get(name, {}), **value}
    with pytest.raises(ConfigError) as caught:
        check(tables)
    assert said in str(caught.value)


def test_generate_says_what_to_use_in_its_place(tmp_path: Path) -> None:
    LoraConfig(task_type="FEATURE_EXTRACTION").save_pretrained(tmp_path)
    with pytest.raises(CallError, match=r"writes no text; in Python, graftlet.train.sentences"):
        generate(str(tmp_path), ["a"], Settings(4, 0.0, 0, True, None, False))


def test_the_shipped_recipe_is_right() -> None:
    assert load_recipe(RECIPES / "answer-finder.toml").task == "embedding"
