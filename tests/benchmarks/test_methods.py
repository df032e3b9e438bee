# SPDX-License-Identifier: Apache-2.0
"""The comparisons: every method has a place in one, settings are real, and the table and the front are right."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import graftlet
from graftlet.methods import init, variants
from graftlet.methods.init import initialiser
from graftlet.registry import entries, lookup
from graftlet.train.optimisers import NAMES
from graftlet.train.prepare import adapter_config
from graftlet.train.recipe import check
from tests.train import tiny


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ARROW, METHODS = load("arrow"), load("methods")
PLAN = METHODS.Plan.read(METHODS.HERE / "methods.toml")
LORA = METHODS.Plan.read(METHODS.HERE / "lora.toml")
ROWS = [pytest.param(plan, name, id=f"{plan.results}-{name}") for plan in (PLAN, LORA) for name in plan.rows]


def kept(file: Path, values: dict[str, Any]) -> str:
    file.write_text(json.dumps(values))
    return str(file)


def run(row: str, metric: float, loss: float, **costs: Any) -> dict[str, Any]:
    facts = {"rate": 0.01, "metric_before": 0.5, "seconds": 60.0, "peak_memory": 2**30, "trainable": 1000}
    facts |= {"bytes": 2048, "steps": 40, "threads": 2, "jobs": 1}
    return {"row": row, "method": row.upper(), "metric": metric, "validation_loss": loss, **facts, **costs}


def results(*runs: dict[str, Any], budget: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "torch": "2.x",
        "device": "cpu",
        "budget": list(budget),
        "runs": list(runs),
        "failed": {"d": "failed at learning rate 1: no"},
    }


def test_every_method_has_a_row_or_a_reason() -> None:
    planned = {lookup(row["method"]).name for row in PLAN.rows.values()}
    left = {lookup(name).name for name in PLAN.left_out}
    assert planned | left == {e.name for e in entries()}
    assert not planned & left


def test_every_option_of_lora_has_a_row_or_a_reason() -> None:
    fields = {field for row in LORA.rows.values() for field in row}
    left = {{"qalora": "use_qalora"}[name] for name in LORA.left_out}
    routed = {"arrow_config"} if "routed" in fields else set()
    assert set(variants._table) <= fields | left | routed
    starts = {str(row.get("init_lora_weights", True)) for row in LORA.rows.values()}
    initialiser(True)  # all are loaded now
    assert {name.replace("<k>", "4") for name in init._table} - {"False"} == starts
    assert set(NAMES) == {t["optimizer"] for row in LORA.rows.values() if (t := row.get("training"))}


@pytest.mark.parametrize(("plan", "name"), ROWS)
def test_the_settings_of_a_row_are_real(plan: Any, name: str) -> None:
    row = plan.rows[name]
    values = METHODS.recipe(plan, row, 0.5, ["training.max_steps=40"])
    if routed := values.pop("routed", None):
        graftlet.ArrowConfig(**routed.pop("router"))
        assert routed.keys() == {"experts", "general"}
    recipe = check({**values, "output": "out"})
    assert adapter_config(recipe).peft_type == lookup(row["method"]).name
    assert recipe.training.learning_rate == 0.5
    assert recipe.training.optimizer == row.get("training", {}).get("optimizer", "adamw_torch")
    assert not recipe.evaluation.verify


def test_cores_are_shared_by_the_runs_at_once() -> None:
    alone, four = (METHODS.recipe(PLAN, PLAN.rows["lora"], 0.5, [], jobs)["model"]["threads"] for jobs in (1, 4))
    assert four == max(1, alone // 4)


def test_of_each_row_the_lowest_validation_loss_is_taken() -> None:
    runs = [run("a", 0.9, 0.5), run("a", 0.7, 0.2), run("b", 0.8, 0.3), run("c", 0.8, 0.4, bytes=1024)]
    assert [(r["row"], r["metric"]) for r in METHODS.best(runs)] == [("c", 0.8), ("b", 0.8), ("a", 0.7)]


def test_a_rate_that_ends_in_nan_is_never_the_best() -> None:
    assert [r["metric"] for r in METHODS.best([run("a", 0.9, math.nan), run("a", 0.7, 3.0)])] == [0.7]


def test_the_front_is_what_nothing_beats_at_its_cost() -> None:
    runs = [run(n, m, 0.1, bytes=b) for n, m, b in (("a", 0.9, 30), ("b", 0.8, 10), ("c", 0.7, 20), ("d", 0.9, 40))]
    assert [r["row"] for r in METHODS.front(runs, "bytes")] == ["b", "a"]


def test_what_is_published(tmp_path: Path) -> None:
    file, page = tmp_path / "methods.json", tmp_path / "methods-compared.md"
    METHODS.publish(PLAN, results(run("a", 0.915, 0.25), run("b", 0.5, 0.7, jobs=3)), file, page)
    text = file.with_suffix(".md").read_text()
    assert "| a | 91.5% | 0.2500 | 60 s | 1,024 MiB | 2 KiB | 1,000 | 0.01 |" in text
    assert "- d: failed at learning rate 1: no" in text
    assert "- xlora: it needs trained adapters to mix" in text
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert "50.0% before training" in page.read_text()
    assert text.strip() in page.read_text()
    assert "](methods-compared.png)" in page.read_text()
    assert page.with_suffix(".png").exists()
    assert "--plan benchmarks/lora.toml" in METHODS.page(LORA, results(run("a", 0.9, 0.2, jobs=3)))
    assert "3 runs at once" in METHODS.page(LORA, results(run("a", 0.9, 0.2, jobs=3)))


def test_a_row_is_not_called_left_out_for_one_rate_that_failed() -> None:
    assert "failed" not in METHODS.table(PLAN, results(run("d", 0.9, 0.2)))


def test_results_of_another_budget_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "methods.json"
    METHODS.keep(results(budget=("training.max_steps=2",)), file)
    assert METHODS.opened(file, ["training.max_steps=2"])["runs"] == []
    with pytest.raises(SystemExit, match="move it away"):
        METHODS.opened(file, [])


def test_runs_go_at_once_and_none_begins_after_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)  # only two runs at once get past it

    def carry_out(values: dict[str, Any]) -> dict[str, Any]:
        both.wait()
        raise RuntimeError(values["title"])

    monkeypatch.setattr(METHODS, "carry_out", carry_out)
    runs, so_far = [("lora", 0.1), ("ia3", 0.2)], results()
    found = list(METHODS.carried_out(PLAN, runs, [], 2, time.monotonic() + 60))
    for name, rate, what in found:
        METHODS.put_down(so_far, name, rate, what)
    assert so_far["failed"]["ia3"] == "failed at learning rate 0.2: ia3"
    assert list(METHODS.carried_out(PLAN, runs, [], 2, time.monotonic() - 1)) == []


def test_the_command_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[str] = []

    def attempt(plan: Any, name: str, rate: float, *rest: Any) -> Any:
        asked.append(name)
        return run(name, 0.9, 0.2, rate=rate) if len(asked) == 1 else "failed: no"

    monkeypatch.setattr(METHODS, "attempt", attempt)
    monkeypatch.setattr(METHODS, "model_folder", lambda source, say: source)
    command = ["methods.py", "--budget", "quick", "--only", "lora,ia3", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    METHODS.main()
    METHODS.main()
    assert asked == ["ia3", "lora", "lora"]
    monkeypatch.setattr(sys, "argv", [*command, "--pages"])
    METHODS.main()
    assert len(asked) == 3
    assert "| ia3 | 90.0%" in (tmp_path / "methods-quick.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("general", [False, True])
def test_a_row_of_several_adapters(general: bool, tmp_path: Path) -> None:
    base, data = tiny.save(tmp_path / "base"), tiny.write_jsonl(tmp_path / "sums.jsonl", tiny.rows())
    values = tiny.recipe(base, data, tmp_path / "run", training={"max_steps": 2}, evaluation={"samples": 0})
    recipe = check({**values, "output": str(tmp_path / "data")})
    pieces = ARROW.sliced(recipe, 3, general, tmp_path / "slices")
    parts = [set(Path(piece["source"]).read_text().splitlines()) for piece in pieces.values()]
    assert list(pieces) == ["expert_0", "expert_1", "expert_2", *(["general"] if general else [])]
    assert sum(map(len, parts[:3])) == len(set.union(*parts[:3])) == 38
    assert not any("odd" in line or "even" in line for line in set().union(*parts[3:]))
    METHODS.child(
        kept(tmp_path / "recipe", {**values, "routed": {"experts": 3, "general": general, "router": {"top_k": 2}}})
    )
    found = METHODS.measured("arrow", 0.1, json.loads((tmp_path / "run" / "summary.json").read_text()))
    assert found["steps"] == 2 * len(pieces)
    assert found["trainable"] == len(pieces) * 2 * 4 * (32 + 32 + 32 + 16)
    assert found["validation_loss"] != pytest.approx(float("nan"), nan_ok=True)
    assert 0 <= found["metric_before"] <= 1


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_not_kept() -> None:
    so_far = results()
    found = METHODS.attempt(PLAN, "lora", 0.5, ['model.source="no/such/folder"'])
    said = METHODS.put_down(so_far, "lora", 0.5, found)
    assert said.startswith("lora failed at learning rate 0.5: ")
    assert so_far["runs"] == []
    assert so_far["failed"]["lora"] in said
