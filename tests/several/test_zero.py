# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO: an adapter that its processes train is the one that a single process trains. `make test-engines` has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from . import jobs, zero
from .launch import launch
from .test_engines import QUICK, agree, alone, recipe_agrees

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: its presence changes what accelerate does, so `make test-engines` has it apart",
    ),
]

ENGINES = tuple(f"zero{stage}" for stage in zero.STAGES)


def started(job: str, processes: int, folder: Path, names: tuple[str, ...]) -> None:
    launch(job, processes, folder, ",".join(names), module="zero", timeout=1200, DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, and one."""
    folder = tmp_path_factory.mktemp("zero")
    alone(folder)
    recipes = [f"recipe_{engine}" for engine in ENGINES]
    others = [job.__name__ for job in zero.ZERO3]
    started("+".join([*ENGINES, "refreshed", *others, *recipes]), 2, folder, QUICK)
    return folder


@pytest.mark.parametrize("engine", [*ENGINES, "started", "checkpointed"])
def test_two_processes_train_the_adapter_of_one(two: Path, engine: str) -> None:
    agree(two, QUICK, engine)


@pytest.mark.parametrize("output", [f"{engine}{cut}" for engine in ENGINES for cut in ("", "-cut")])
def test_a_recipe_gives_the_adapter_of_one_process_also_after_a_cut(two: Path, output: str) -> None:
    recipe_agrees(two, output)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_checkpoint_holds_the_base(two: Path, engine: str) -> None:
    newest = two / engine / "checkpoints" / "checkpoint-4"
    written = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    assert written < (two / "chat" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("processes", [2, 4])
def test_every_kind_of_method_under_zero(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "METHODS", {**jobs.METHODS, **zero.BIASES})
    names = tuple(jobs.METHODS)
    jobs.alone(str(tmp_path), ",".join(names))
    started("+".join([*ENGINES, "zero3_loaded"]), processes, tmp_path, names)
    for engine in (*ENGINES, "started"):
        agree(tmp_path, names, engine)
