# SPDX-License-Identifier: Apache-2.0
"""An adapter that several processes train is the one that a single process trains, whatever engine binds them together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from graftlet.train.run import train

from ..train import tiny
from . import jobs
from .launch import launch

QUICK = ("lora", "saved", "tokens", "vblora", "prompt")
"""Thin factors, whole modules, a base weight's rows, tensors made for the file, rows beside the model."""
ENGINES = ("ddp", "fsdp2", "tp")


def agree(folder: Path, names: tuple[str, ...], engine: str) -> None:
    """Each adapter is that of one process, but for the order in which numbers were added."""
    for name in names:
        if engine != "tp" or name not in jobs.UNSHARED:
            assert jobs.off(folder / name, folder / f"{name}-{engine}", folder / f"{name}-start") < 1e-3, name


def alone(folder: Path) -> None:
    """What one process makes: of a recipe, and of the quick methods."""
    tiny.save(folder / "chat")
    tiny.write_jsonl(folder / "sums.jsonl", tiny.rows())
    train(jobs.recipe(str(folder), 4, "alone"), console=Console(quiet=True))
    jobs.alone(str(folder), ",".join(QUICK))


def recipe_agrees(folder: Path, output: str) -> None:
    """A recipe's adapter is that of one process, and it went on from a checkpoint where it was cut."""
    moved = jobs.apart(folder / "alone", folder / "alone" / "checkpoints" / "checkpoint-2")
    assert jobs.apart(folder / "alone", folder / output) < 1e-3 * moved
    summary = json.loads((folder / output / "summary.json").read_text())
    assert summary["training"]["processes"] == 2
    assert bool(summary["training"]["resumed_from"]) == output.endswith("cut")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, and one: they are started once, as that takes longest."""
    folder = tmp_path_factory.mktemp("two")
    alone(folder)
    launch("+".join([*ENGINES, "recipe_ddp", "recipe_fsdp2"]), 2, folder, ",".join(QUICK), timeout=600)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_the_adapter_of_one(two: Path, engine: str) -> None:
    agree(two, QUICK, engine)


@pytest.mark.parametrize("output", ["ddp", "ddp-cut", "fsdp2", "fsdp2-cut"])
def test_a_recipe_gives_the_adapter_of_one_process_also_after_a_cut(two: Path, output: str) -> None:
    recipe_agrees(two, output)


def test_what_two_processes_measure_is_what_one_does(two: Path) -> None:
    ours, alone = (json.loads((two / n / "summary.json").read_text())["measured"] for n in ("ddp", "alone"))
    assert ours[0]["metric"] == alone[0]["metric"]
    assert ours[0]["validation_loss"] == pytest.approx(alone[0]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("output", ["ddp", "fsdp2"])
def test_no_checkpoint_holds_the_base(two: Path, output: str) -> None:
    newest = two / output / "checkpoints" / "checkpoint-4"
    written = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    assert written < (two / "chat" / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_kind_of_method_on_every_engine(tmp_path: Path, processes: int) -> None:
    names = tuple(jobs.METHODS)
    jobs.alone(str(tmp_path), ",".join(names))
    launch("+".join(ENGINES), processes, tmp_path, ",".join(names), timeout=1200)
    for engine in ENGINES:
        agree(tmp_path, names, engine)


@pytest.mark.slow
def test_half_precision_main_memory_merges_four_bits_and_experts_under_fsdp2(tmp_path: Path) -> None:
    jobs.alone(str(tmp_path), "lora")
    launch("policies+fsdp2_merged+qlora+fsdp2_experts", 2, tmp_path, "lora", timeout=900)


@pytest.mark.slow
def test_a_merge_under_tensor_parallelism_is_that_of_one_process(tmp_path: Path) -> None:
    jobs.base().save_pretrained(tmp_path / "base")
    launch("tp_merged", 2, tmp_path, "lora,dora,embedding,tokens,oft,ia3,vera", timeout=900)


@pytest.mark.slow
def test_no_process_holds_the_whole_base_as_it_is_loaded(tmp_path: Path) -> None:
    jobs.large(str(tmp_path))
    launch("loaded", 2, tmp_path, "", timeout=900)
