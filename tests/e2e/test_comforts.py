# SPDX-License-Identifier: Apache-2.0
"""`graftlet init`, `graftlet compare`, completion, and what a run reports to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftlet.cli import ENGINES, TASKS, app
from graftlet.errors import ConfigError, DependencyError
from graftlet.registry import entries
from graftlet.serve.export import TARGETS
from graftlet.train import tasks, trainer
from graftlet.train.recipe import load_recipe
from graftlet.train.rules import RULES
from graftlet.train.run import train

from .test_cli import graftlet, trained  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def other(trained: Path, base: Path) -> Path:  # noqa: F811
    """The same recipe with another learning rate, twice as long."""
    recipe = load_recipe(
        trained.parent / "r.toml", ["learning_rate=2e-3", "max_steps=12", f"output={trained.parent / 'other'}"]
    )
    return train(recipe).output


# init


def test_init_asks_and_writes_a_recipe_that_trains(base: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    said = (
        "\n".join(["sft", str(base), str(data), "{text}?", "{label}", "hra", "4", "0.01", "1", str(tmp_path / "out")])
        + "\n"
    )
    told = CliRunner().invoke(app, ["init", str(path)], input=said)
    assert told.exit_code == 0, told.output
    assert "Which base model?" in told.output
    assert f"graftlet train {path}" in told.output
    recipe = load_recipe(path, ["max_steps=1", "model.device=cpu", "model.threads=1", "validation=4"])
    assert (recipe.adapter.method, recipe.adapter.fields) == ("hra", {"r": 4})
    assert (train(recipe).output / "adapter_model.safetensors").is_file()


def test_init_asks_only_what_is_open(tmp_path: Path) -> None:
    words = [
        "init",
        str(tmp_path / "r.toml"),
        "--task",
        "sft",
        "--model",
        "m",
        "--data",
        "d.csv",
        "--prompt",
        "{q}",
        "--completion",
        "{a}",
    ]
    told = CliRunner().invoke(app, [*words, "--method", "ia3", "--epochs", "2", "--output", "o"], input="0.003\n")
    assert told.exit_code == 0, told.output
    assert "rank" not in told.output  # IA3 has none
    recipe = load_recipe(tmp_path / "r.toml")
    assert (recipe.training.learning_rate, recipe.training.epochs, recipe.adapter.method) == (0.003, 2, "ia3")
    assert recipe.adapter.fields == {}


def test_init_needs_no_person(graftlet, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "deep" / "r.toml"
    assert graftlet("init", path, "--yes", "--rank", 16)[0] == 0
    assert load_recipe(path).adapter.fields == {"r": 16, "lora_alpha": 32}
    status, _, said = graftlet("init", path, "--yes")
    assert (status, "--overwrite" in said) == (1, True)
    assert graftlet("init", path, "--yes", "--overwrite")[0] == 0


def test_every_key_that_init_names_exists(tmp_path: Path, graftlet) -> None:  # noqa: F811
    """Each line that is commented out is a key of a recipe, with a value that it can have."""
    path = tmp_path / "r.toml"
    graftlet("init", path, "--yes")
    text = path.read_text()
    wanted = re.sub(r"^# (\w+ = |\[)", r"\1", text, flags=re.MULTILINE)
    assert wanted.count("\n# ") == 0
    path.write_text(wanted.replace('metric = "exact_match"', 'metric = "exact_match"\non = "validation"'))
    recipe = load_recipe(path)
    assert (recipe.training.patience, recipe.quantization.method) == (3, "nf4")  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("task", RULES)
def test_init_knows_every_task(task: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    told = CliRunner().invoke(app, ["init", str(path), "--yes", "--task", task])
    assert told.exit_code == 0, told.output
    assert load_recipe(path).task == task
    assert f'task = "{task}"' in path.read_text()
    assert set(RULES) == set(TASKS) == set(tasks.TASKS)


def test_init_refuses_another_task(graftlet, tmp_path: Path) -> None:  # noqa: F811
    status, _, said = graftlet("init", tmp_path / "r.toml", "--yes", "--task", "reword")
    assert (status, "there is no such task" in said) == (1, True)
    assert not (tmp_path / "r.toml").exists()


METHODS = [e.name for e in entries()]


@pytest.mark.parametrize("method", METHODS)
def test_init_knows_every_method(method: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["init", str(tmp_path / "r.toml"), "--yes", "--method", method])
    if isinstance(told.exception, ConfigError):
        assert "method" in str(told.exception) or "needs" in str(told.exception) or "adapter" in str(told.exception)
        assert not (tmp_path / "r.toml").exists()
    else:
        assert told.exit_code == 0, told.output
        assert load_recipe(tmp_path / "r.toml").adapter.method == method.lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "lorra"), "did you mean 'LORA'"),
        (("--learning-rate", -1), "learning_rate"),
        (("--epochs", 0), "epochs"),
    ],
)
def test_init_writes_no_recipe_that_is_none(graftlet, tmp_path: Path, words: tuple[object, ...], said: str) -> None:  # noqa: F811
    status, _, told = graftlet("init", tmp_path / "r.toml", "--yes", *words)
    assert (status, said in told) == (1, True), told
    assert not (tmp_path / "r.toml").exists()


# compare


def test_compare_shows_figures_and_what_differs(graftlet, trained: Path, other: Path, tmp_path: Path) -> None:  # noqa: F811
    page = tmp_path / "pages" / "compare.html"
    status, told, _ = graftlet("compare", trained, other, "--html", page)
    assert status == 0
    for words in ("validation loss", "training.learning_rate", "0.002", "training.max_steps", f"page: {page}"):
        assert words in told, words
    assert "output" not in told
    text = page.read_text()
    for title in ("Training loss", "Validation loss", "Learning rate", "Where the recipes differ"):
        assert f"<h2>{title}</h2>" in text
    assert not re.search(r"""(src|href|srcset)\s*=\s*["'](?!data:)|@import|url\(|<script""", text)
    status, told, _ = graftlet("compare", trained, other, "--json")
    assert json.loads(told)["settings"]["training.max_steps"] == {"out": 6, "other": 12}


def test_compare_refuses_what_is_no_run(graftlet, trained: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "summary.json").write_text("[]")
    for folders, said in (
        ((trained,), "two different runs"),
        ((trained, trained), "two different runs"),
        ((trained, tmp_path), "no summary of a run"),
        ((trained, tmp_path / "nowhere"), "holds no run"),
    ):
        status, _, told = graftlet("compare", *folders)
        assert (status, said in told) == (1, True), told


# the report


def test_the_report_has_rates_and_maps(trained: Path) -> None:  # noqa: F811
    text = (trained / "report.html").read_text()
    for title in ("Learning rate", "Size of the change, ‖ΔW‖", "Effective rank of the change", "Answers"):
        assert f"<h2>{title}</h2>" in text, title
    layers = json.loads((trained / "summary.json").read_text())["layers"]
    assert {x["rank"] for x in layers} == {4}
    assert all(x["norm"] > 0 for x in layers)


# completion


def test_a_shell_completes(tmp_path: Path) -> None:
    code = "from graftlet.cli import app; app(prog_name='graftlet')"
    env = {**os.environ, "_GRAFTLET_COMPLETE": "complete_bash", "COMP_WORDS": "graftlet me", "COMP_CWORD": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert set(told.stdout.split()) == {"merge", "methods"}, told
    assert set(ENGINES) == set(TARGETS)
    env |= {"COMP_WORDS": "graftlet export a b --to ", "COMP_CWORD": "5"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert set(told.stdout.split()) == set(TARGETS), told


# report_to


def test_a_run_reports_to_tensorboard(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    monkeypatch.chdir(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = reported(base, data, tmp_path, "tensorboard")
    held = EventAccumulator(str(output / "logs"))
    held.Reload()
    assert not Path("runs").exists()
    assert len(held.Scalars("train/loss")) == 2
    assert held.Scalars("train/learning_rate")[0].value > 0


def test_a_run_reports_to_trackio(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before it is imported
    pytest.importorskip("trackio", reason="pip install trackio")
    reported(base, data, tmp_path, "trackio")
    assert list((tmp_path / "trackio").rglob("*.db"))


def reported(base: Path, data: Path, folder: Path, to: str) -> Path:
    words = ["--yes", "--model", base, "--data", data, "--prompt", "{text}", "--completion", "{label}"]
    told = CliRunner().invoke(app, list(map(str, ["init", folder / "r.toml", *words, "--output", folder / "out"])))
    assert told.exit_code == 0, told.output
    changes = [f'report_to=["{to}"]', "max_steps=2", "log_every=1", "device=cpu", "threads=1", "validation=4"]
    return train(load_recipe(folder / "r.toml", changes)).output


def test_a_missing_tracker_is_told_first(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftlet.requirements import Requirement

    missing = Requirement("training.report_to = 'wandb'", "no-such-package-at-all", ">=1")
    monkeypatch.setitem(trainer.TRACKERS, "wandb", missing)
    with pytest.raises(DependencyError, match="pip install"):
        reported(base, data, tmp_path, "wandb")
    assert not (tmp_path / "out").exists()
