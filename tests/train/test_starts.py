# SPDX-License-Identifier: Apache-2.0
"""A start from data in a recipe: a name under [adapter] is enough."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import graftlet
from graftlet.train import callbacks
from graftlet.train.recipe import check
from graftlet.train.run import train

from . import tiny


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_recipe_starts_from_its_training_data(base: Path, tmp_path: Path, start: str, monkeypatch: Any) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.rows())
    changes = {
        "adapter": {"init_lora_weights": start},
        "training": {"max_steps": 2, "save_every": 1},
        "evaluation": {"samples": 1, "verify": True},
    }
    recipe = check(tiny.recipe(base, data, tmp_path / "out", **changes))
    monkeypatch.setattr(callbacks, "TOLD_EVERY", 0.0)
    told = io.StringIO()
    made = train(recipe, console=Console(file=told))
    lines = [line for line in told.getvalue().splitlines() if line.startswith(f"start {start}: ")]
    done, total, batches = map(int, re.findall(r"\d+", lines[-1])[:3])
    assert done == total > 1
    assert batches >= 1
    assert f"start {start}: 0 of {total} layers, 1 batches" in lines
    stages = {e["stage"]: e["validation_loss"] for e in made.summary["measured"]}
    after = stages["after training"]
    assert stages["saved and loaded into a fresh base"] == pytest.approx(after, abs=1e-4)
    assert stages["merged into the base"] == pytest.approx(after, abs=1e-4)
    tensors = graftlet.load_peft_weights(made.output)
    config = graftlet.PeftConfig.from_pretrained(made.output)
    if start == "eva":
        rows = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), atol=0.2, rtol=0)
    else:
        assert config.init_lora_weights is True  # type: ignore[attr-defined]
        assert config.r == 8  # type: ignore[attr-defined]

    resumed = check(tiny.recipe(base, data, tmp_path / "out", resume=True, **{**changes, "evaluation": {"samples": 0}}))
    (made.output / "adapter_model.safetensors").unlink()
    again = train(resumed, console=Console(quiet=True))
    for key, tensor in graftlet.load_peft_weights(again.output).items():
        torch.testing.assert_close(tensor, tensors[key], atol=1e-4, rtol=1e-3)


def test_a_terminal_sees_a_bar() -> None:
    seen = io.StringIO()
    with callbacks.measuring(Console(file=seen, force_terminal=True, no_color=True, highlight=False), "eva") as show:
        show(0, 4, 1)
        show(3, 4, 2)
    assert "3/4" in seen.getvalue()
    assert "layers, 2 batches" in seen.getvalue()
    assert "3 of 4 layers measured in 2 batches" in seen.getvalue()
