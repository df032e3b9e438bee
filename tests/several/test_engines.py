# SPDX-License-Identifier: Apache-2.0
"""An adapter that several processes train is the one that a single process trains, whatever engine binds them together."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import jobs
from .launch import launch

QUICK = ("lora", "saved", "tokens", "vblora", "prompt")
"""Thin factors, whole modules, a base weight's rows, tensors made for the file, rows beside the model."""


def check(folder: Path, names: str, engine: str, processes: int) -> None:
    """Each adapter is that of one process, but for the order in which numbers were added."""
    jobs.alone(str(folder), names)
    launch(engine, processes, folder, names, timeout=900)
    for name in names.split(","):
        moved = jobs.apart(folder / name, folder / f"{name}-start")
        for kind in engine.split("+"):
            assert jobs.apart(folder / name, folder / f"{name}-{kind}") < 1e-3 * moved, (name, kind)


def test_two_processes_train_the_adapter_of_one(tmp_path: Path) -> None:
    check(tmp_path, ",".join(QUICK), "ddp+fsdp2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_kind_of_method_on_every_engine(tmp_path: Path, processes: int) -> None:
    check(tmp_path, ",".join(jobs.METHODS), "ddp+fsdp2", processes)
