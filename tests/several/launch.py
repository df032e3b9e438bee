# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine, as `torchrun` would start them, talking through gloo on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(
    job: str, processes: int, *arguments: object, module: str = "jobs", timeout: int = 300, **environment: str
) -> str:
    """Run `jobs.JOB(*arguments)` in so many processes, and give what the first one printed. module: that has the job."""
    code = f"from tests.several import {module}; {module}.main({job!r}, *{list(map(str, arguments))!r})"
    return run([sys.executable, "-c", code], processes, timeout, **environment)


def run(command: list[str], processes: int, timeout: int = 300, **environment: str) -> str:
    """Run a command in so many processes; the output of those that fail is the failure's message."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "true", **environment,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [f"process {i}:\n{text[-4000:]}" for i, text in enumerate(told) if started[i].returncode]
    assert not failed, "\n\n".join(failed)
    return told[0]
