# SPDX-License-Identifier: Apache-2.0
"""A recipe on several processes: the data is shared out, the first process talks and writes, and a cut run goes on."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from graftlet.train.run import train

from ..train import tiny
from . import jobs
from .launch import launch


def test_a_recipe_gives_the_same_adapter_on_one_and_on_two_processes(tmp_path: Path) -> None:
    tiny.save(tmp_path / "base")
    tiny.write_jsonl(tmp_path / "sums.jsonl", tiny.rows())
    train(jobs.recipe(str(tmp_path), 4, "alone"), console=Console(quiet=True))
    launch("recipe_ddp+recipe_fsdp2", 2, tmp_path)
    moved = jobs.apart(tmp_path / "alone", tmp_path / "alone" / "checkpoints" / "checkpoint-2")
    for output in ("ddp", "ddp-cut", "fsdp2", "fsdp2-cut"):
        assert jobs.apart(tmp_path / "alone", tmp_path / output) < 1e-3 * moved, output
    summary = json.loads((tmp_path / "ddp-cut" / "summary.json").read_text())
    assert summary["training"]["processes"] == 2
    assert summary["training"]["resumed_from"].endswith("checkpoint-2")
    assert (
        summary["measured"][0]["metric"]
        == json.loads((tmp_path / "alone" / "summary.json").read_text())["measured"][0]["metric"]
    )
    newest = tmp_path / "fsdp2" / "checkpoints" / "checkpoint-4"
    written = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    assert written < (tmp_path / "base" / "model.safetensors").stat().st_size  # the base is in no checkpoint
