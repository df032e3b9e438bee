# SPDX-License-Identifier: Apache-2.0
"""Programs that say `import peft`, run with the reference or with the drop-in, each in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "compat" / "peft" / "src"
SHADOWS = "GRAFTLET_SHADOWS_PEFT"


def run(code: str, dropin: bool, source: Path = SOURCE, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program's run. The drop-in stands before the reference, which is installed in this environment."""
    paths = [*([str(source)] if dropin else []), str(ROOT / "src"), str(ROOT)]
    clean = {k: v for k, v in os.environ.items() if k not in (SHADOWS, "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **clean,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def answer(code: str, dropin: bool) -> Any:
    """What a program prints last, as JSON."""
    done = run(code, dropin, **({SHADOWS: "1"} if dropin else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
