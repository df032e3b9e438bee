# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods: every method has a place in it, settings are real, and the table and the front are right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graftlet.registry import entries, lookup
from graftlet.train.prepare import adapter_config
from graftlet.train.recipe import check


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "benchmarks_methods", Path(__file__).parents[2] / "benchmarks" / "methods.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METHODS = load()


def run(row: str, metric: float, loss: float, **costs: Any) -> dict[str, Any]:
    facts = {"rate": 0.01, "metric_before": 0.5, "seconds": 60.0, "peak_memory": 2**30, "trainable": 1000}
    facts |= {"bytes": 2048, "steps": 40, "device": "cpu", "threads": 2}
    return {"row": row, "method": row.upper(), "metric": metric, "validation_loss": loss, **facts, **costs}


def results(*runs: dict[str, Any], budget: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "torch": "2.x",
        "budget": list(budget),
        "runs": list(runs),
        "failed": {"d": "failed at learning rate 1: no"},
    }


def test_every_method_has_a_row_or_a_reason() -> None:
    planned = {lookup(row["method"]).name for row in METHODS.rows().values()}
    left = {lookup(name).name for name in METHODS.PLAN["left_out"]}
    assert planned | left == {e.name for e in entries()}
    assert not planned & left


@pytest.mark.parametrize("name", METHODS.rows())
def test_the_settings_of_a_row_are_real(name: str) -> None:
    row = METHODS.rows()[name]
    recipe = check({**METHODS.recipe(row, 0.5, ["training.max_steps=40"]), "output": "out"})
    assert adapter_config(recipe).peft_type == lookup(row["method"]).name
    assert recipe.training.learning_rate == 0.5
    assert not recipe.evaluation.verify


def test_of_each_row_the_lowest_validation_loss_is_taken() -> None:
    runs = [run("a", 0.9, 0.5), run("a", 0.7, 0.2), run("b", 0.8, 0.3), run("c", 0.8, 0.4, bytes=1024)]
    assert [(r["row"], r["metric"]) for r in METHODS.best(runs)] == [("c", 0.8), ("b", 0.8), ("a", 0.7)]


def test_the_front_is_what_nothing_beats_at_its_cost() -> None:
    runs = [run(n, m, 0.1, bytes=b) for n, m, b in (("a", 0.9, 30), ("b", 0.8, 10), ("c", 0.7, 20), ("d", 0.9, 40))]
    assert [r["row"] for r in METHODS.front(runs, "bytes")] == ["b", "a"]


def test_what_is_published(tmp_path: Path) -> None:
    file, page = tmp_path / "methods.json", tmp_path / "methods-compared.md"
    METHODS.publish(results(run("a", 0.915, 0.25), run("b", 0.5, 0.7)), file, page)
    assert len(json.loads(file.read_text())["runs"]) == 2
    text = file.with_suffix(".md").read_text()
    assert "| a | 91.5% | 0.2500 | 60 s | 1,024 MiB | 2 KiB | 1,000 | 0.01 |" in text
    assert "- d: failed at learning rate 1: no" in text
    assert "- xlora: it needs trained adapters to mix" in text
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert "50.0% before training" in page.read_text()
    assert text.strip() in page.read_text()
    assert "](methods-compared.png)" in page.read_text()
    assert page.with_suffix(".png").exists()


def test_results_of_another_budget_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "methods.json"
    METHODS.publish(results(budget=("training.max_steps=2",)), file, None)
    assert METHODS.opened(file, ["training.max_steps=2"])["runs"] == []
    with pytest.raises(SystemExit, match="move it away"):
        METHODS.opened(file, [])


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_not_kept() -> None:
    so_far = results()
    row = METHODS.rows()["lora"]
    so_far["budget"] = ['model.source="no/such/folder"']
    said = METHODS.attempt(so_far, "lora", row, 0.5)
    assert said.startswith("lora failed at learning rate 0.5: ")
    assert so_far["runs"] == []
    assert so_far["failed"]["lora"] in said
