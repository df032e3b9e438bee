# SPDX-License-Identifier: Apache-2.0
"""Runs one library's jobs in the environment that it is started in: `python jobs LIBRARY OUT [JOB ...]`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


def main(library: str, out: str, only: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    jobs = importlib.import_module(f"{library}_jobs").JOBS
    seen = {}
    for job in jobs:
        if only and job.__name__ not in only:
            continue
        start = time.perf_counter()
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = {"seen": job(Path(folder))}
            except Exception:
                found = {"error": traceback.format_exc()}
        seen[job.__name__] = {"about": job.__doc__.strip(), "seconds": time.perf_counter() - start, **found}
    torch.save(seen, out)


if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "WANDB_DISABLED": "true",
    }
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
