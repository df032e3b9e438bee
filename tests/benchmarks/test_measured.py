# SPDX-License-Identifier: Apache-2.0
"""The page of what was measured: it says and draws what the files of results hold, whatever rows those have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_methods import load

MEASURED = load("measured")
CHARTS = MEASURED.charts
PARTS = [pytest.param(part, id=part.name) for part in MEASURED.PARTS]


def test_the_pages_are_what_is_made_of_the_results() -> None:
    made = {**MEASURED.tables(), MEASURED.DOCS / "speed-measured.md": MEASURED.page()}
    assert len(made) >= 5
    for file, text in made.items():
        assert file.read_text() == text, f"{file} is of other results: python benchmarks/measured.py"


@pytest.mark.parametrize("part", PARTS)
def test_every_chart_has_its_results_its_script_and_a_small_file(part: Any) -> None:
    assert part.file is not None
    assert (MEASURED.HERE / part.script).is_file()
    assert part.chart.stat().st_size < 100_000
    text = (MEASURED.DOCS / "speed-measured.md").read_text()
    assert f"](images/{part.chart.name})" in text
    assert f"`benchmarks/results/{part.file.name}`" in text


@pytest.mark.parametrize("draw", [CHARTS.bars, CHARTS.dots, CHARTS.ratios])
def test_the_same_values_give_the_same_chart_and_others_another(draw: Any, tmp_path: Path) -> None:
    seen = []
    for value in (2, 2, 3):
        row = (
            {"reference": value, "Graftlet": 0.5, "optimised": 1.1}
            if draw is not CHARTS.ratios
            else {"Graftlet": value}
        )
        CHARTS.kept(draw({"ms": {"a": row, "b": {"Graftlet": 0.2}}, "GB": {"a": {"Graftlet": 1}}}), tmp_path / "a.png")
        seen.append((tmp_path / "a.png").read_bytes())
    assert seen[0] == seen[1] != seen[2]


def test_a_step_is_the_base_and_each_setting_as_it_is_and_optimised() -> None:
    rows = [
        {"what": "frozen", "who": "base", "ms": 100, "GB": 1},
        {"what": "r8", "who": "graftlet", "ms": 120, "GB": 2},
        {"what": "r8", "who": "reference", "ms": 240, "GB": 8},
        {"what": "r8 optimised", "who": "graftlet", "ms": 90, "GB": 0.5},
        {"what": "new", "who": "graftlet", "ms": 7, "GB": 3},
    ]
    panels = MEASURED.step({"rows": rows})
    assert panels == {
        "a step, ms": {
            "frozen": {"base alone": 100},
            "r8": {"Graftlet": 120, "reference": 240, "optimised": 90},
            "new": {"Graftlet": 7},
        },
        "peak memory, GB": {
            "frozen": {"base alone": 1},
            "r8": {"Graftlet": 2, "reference": 8, "optimised": 0.5},
            "new": {"Graftlet": 3},
        },
    }
    assert list(MEASURED.gist(panels, "Graftlet")) == [
        "a step 0.50 to 0.50 of the reference's (median 0.50)",
        "peak memory 0.25 to 0.25 of the reference's (median 0.25)",
    ]
    assert next(MEASURED.gist(panels, "optimised")) == "a step 0.38 to 0.38 of the reference's (median 0.38)"


def test_a_step_on_a_cpu_has_whatever_was_measured() -> None:
    both = {"graftlet": 2, "reference": 4, "ratio": 0.5}
    row = {"what": "LoRA", "ms": {**both, "optimised": 1, "ratio, optimised": 0.25}, "peak": both, "busy": both}
    assert MEASURED.cpu_step({"rows": [row]}) == {
        "a step, ms": {"LoRA": {"Graftlet": 2, "optimised": 1, "reference": 4}},
        "the process's peak memory, MB": {"LoRA": {"Graftlet": 2, "reference": 4}},
    }


def test_batches_have_a_panel_a_size_and_the_rest_a_table() -> None:
    rows = [
        {"what": "4 rows of 1, base", "who": "graftlet", "s": 0.001},
        {"what": "4 rows of 1, base", "who": "reference", "s": 0.009},
        {"what": "4 rows of 1, all", "who": "reference", "s": 0.004},
        {"what": "4 rows of 1, all, CUDA graph", "who": "graftlet", "s": 0.002},
        {"what": "4 rows of 9, all", "who": "graftlet", "s": 0.003},
        {"what": "save", "who": "graftlet", "s": 0.5},
    ]
    assert MEASURED.mixed({"rows": rows}) == {
        "4 rows of 1 token, ms": {"base": {"base alone": 1}, "all": {"reference": 4, "in a CUDA graph": 2}},
        "4 rows of 9 tokens, ms": {"all": {"Graftlet": 3}},
    }
    assert MEASURED.files({"rows": rows}) == {"ms": {"save": {"Graftlet": 500}}}


def test_a_stack_has_ratios_in_the_order_of_the_steps_and_no_panel_without_numbers() -> None:
    rows = [
        {"method": "A", "step": {"graftlet": 3, "reference": 2}, "GB": {"graftlet": 0.0, "reference": 0.0}},
        {"method": "B", "step": {"graftlet": 1, "reference": 2}, "merge": {"graftlet": 1}},
    ]
    panels = MEASURED.stack({"rows": rows})
    assert panels == {"a step": {"B": {"Graftlet": 0.5}, "A": {"Graftlet": 1.5}}}
    assert list(panels["a step"]) == ["B", "A"]


@pytest.mark.parametrize(("value", "said"), [(16440.6, "16,441"), (137.2, "137"), (17.34, "17.3"), (0.104, "0.10")])
def test_numbers_have_three_digits_at_most_two_after_the_point(value: float, said: str) -> None:
    assert CHARTS.number(value) == said


def test_what_was_not_measured_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MEASURED, "RESULTS", tmp_path)
    facts = {"device": "CPU", "date": "2026-01-01", "torch": "2.x"}
    row = {"what": "save", "who": "graftlet", "s": 0.5}
    (tmp_path / "serving.json").write_text(MEASURED.json.dumps({**facts, "rows": [row]}))
    assert [part.name for part, *_ in MEASURED.there()] == ["files"]
    text = MEASURED.page()
    assert "CPU, torch 2.x, 2026-01-01. From `benchmarks/results/serving.json`" in text
    assert text.count("![") == 1
