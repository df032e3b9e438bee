# SPDX-License-Identifier: Apache-2.0
"""The doctor: what works, what is missing, what is broken; the command and its exit status."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftlet.cli import app
from graftlet.errors import CallError
from graftlet.knowledge import features
from graftlet.knowledge.doctor import diagnose
from graftlet.knowledge.environments import PAGES, features_of
from graftlet.knowledge.features import Feature, examine, needs
from graftlet.requirements import REQUIREMENTS

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parents[2]


def declared() -> dict[str, str]:
    """The ranges in `pyproject.toml`, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    split = [re.match(r"([\w.-]+)(?:\[\w+\])?([<>=,\d.]*)", line) for line in lines]
    return {found[1].lower(): found[2] for found in split if found is not None}


def test_ranges_are_those_of_the_package() -> None:
    known = declared()
    for environment in PAGES:
        for package in (p for f in environment.features for p in f.packages):
            if package.package.lower() in known:
                assert known[package.package.lower()] == package.versions, package.package


def test_the_back_ends_are_all_there() -> None:
    quantised = {f.name for f in next(e for e in PAGES if e.name == "quantised-training").features}
    assert set(REQUIREMENTS) <= quantised
    assert quantised >= {"gptq", "auto-gptq", "awq", "eetq"}


def test_what_works() -> None:
    found = examine(features.ADAPTERS)
    assert found.works
    assert "torch" in found.why


def test_what_is_absent() -> None:
    found = examine(Feature("x", "X", (needs("no-such-package-here", ">=1"),)))
    assert (found.state, found.why) == ("absent", "no-such-package-here is not installed")
    assert found.command == 'pip install "no-such-package-here>=1"'


def test_what_is_of_another_version() -> None:
    found = examine(Feature("x", "X", (needs("pytest", ">=900"),)))
    assert found.state == "broken"
    assert re.match(r"pytest [\d.]+ is installed, >=900 is needed", found.why)


def test_half_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_module_here")
    monkeypatch.syspath_prepend(tmp_path)
    found = examine(Feature("x", "X", modules=("half_there",), command="mend"))
    assert (found.state, found.command) == ("broken", "mend")
    assert "half_there cannot be imported: ModuleNotFoundError" in found.why


def test_kernels_say_why_they_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(features.STEP).works
    monkeypatch.setenv("GRAFTLET_KERNELS", "0")
    assert examine(features.STEP).why == "GRAFTLET_KERNELS=0 is set"
    assert examine(features.DROPOUT).why == "GRAFTLET_KERNELS=0 is set"


def test_a_feature_is_asked_for_by_any_of_its_names() -> None:
    assert [f.name for f in features_of("bnb")] == ["bnb"]
    assert [f.name for f in features_of("BitsAndBytesConfig")] == ["bnb"]
    assert {"adapters", "cuda"} == {f.name for f in features_of("get_peft_model")}
    with pytest.raises(CallError, match="'BitsAndBytesConfi', did you mean 'BitsAndBytesConfig'"):
        diagnose("BitsAndBytesConfi")


def test_optional_features_do_not_count_for_an_environment() -> None:
    ward = diagnose("cpu").wards[0]
    assert ward.works == all(f.works for f in ward.findings if not f.feature.optional)


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_the_exit_status_says_whether_a_feature_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("doctor", "--feature", "serving")[0] == 0
    monkeypatch.setenv("GRAFTLET_KERNELS", "0")
    status, said = invoke("doctor", "--feature", "one-step-product")
    assert status == 1
    assert "GRAFTLET_KERNELS=0 is set" in said
    assert "unset GRAFTLET_KERNELS" in said


def test_all_of_it_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "unimportable", lambda module: None)
    status, said = invoke("doctor", "--json")
    found = json.loads(said)
    assert set(found["environments"]) == {e.name for e in PAGES}
    assert found["well"] is (status == 0)


def test_a_recipe_is_looked_at(tmp_path: Path) -> None:
    recipe = ROOT / "examples" / "recipes" / "short-answers.toml"
    text = re.sub(r"learning_rate = .*", "learning_rate = 1e-6", recipe.read_text())
    text = re.sub(r'source = "package:llm.*', 'source = "nobody/nothing"', text)
    (tmp_path / "recipe.toml").write_text(text)
    said = invoke("doctor", str(tmp_path / "recipe.toml"), "--feature", "adapters")[1]
    assert "[learning-rate-of-lora]" in said


def test_explain_shows_pages_and_lists_them() -> None:
    status, said = invoke("explain", "merge-rounded")
    assert status == 0
    assert "merge_and_unload(dequantize=True)" in said
    status, said = invoke("explain")
    assert status == 0
    assert all(name in said for name in ("merge-rounded", "quantised-training", "gradient-checkpointing"))
    assert isinstance(CliRunner().invoke(app, ["explain", "merge-roundet"]).exception, CallError)
