# SPDX-License-Identifier: Apache-2.0
"""Runs every job with the reference and with the drop-in, compares what both saw, and keeps the table.

python -m tests.ecosystem [LIBRARY ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import environments
from .comparison import NEAR, differences
from .environments import HERE, ROOT, Environment

LIBRARIES = {
    "accelerate": "accelerate",
    "transformers": "transformers",
    "sentence_transformers": "sentence-transformers",
    "diffusers": "diffusers",
    "trl": "trl",
}
"""The modules of jobs, and the package of each."""
RESULTS = ROOT / "benchmarks" / "results"


def started(environment: Environment, library: str, out: Path) -> subprocess.Popen[bytes]:
    """One library's jobs, running in an environment; what they print goes beside what they saw."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GRAFTLET_SHADOWS_PEFT")}
    command = [environment.python, "jobs", library, str(out)]
    log = out.with_suffix(".log").open("wb")
    return subprocess.Popen(command, cwd=HERE, env=clean, stdout=log, stderr=log)


def both(library: str, theirs: Environment, ours: Environment, folder: Path) -> list[dict[str, Any]]:
    """A line for each job of a library."""
    outs = [folder / f"{library}-reference.pt", folder / f"{library}-dropin.pt"]
    runs = [started(environment, library, out) for environment, out in zip((theirs, ours), outs, strict=True)]
    for run, out in zip(runs, outs, strict=True):
        if run.wait():
            sys.exit(f"{out.stem} ended with {run.returncode}:\n{out.with_suffix('.log').read_text()[-3000:]}")
    seen, mine = (torch.load(out, weights_only=True) for out in outs)
    return [line(job, seen[job], mine[job]) for job in seen]


def line(job: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What came of one job."""
    facts = {"job": job, "about": ours["about"], "seconds": [round(x["seconds"], 1) for x in (theirs, ours)]}
    failed = {name: x["error"] for name, x in (("reference", theirs), ("drop-in", ours)) if "error" in x}
    if failed:
        return {**facts, "outcome": f"fails with the {' and the '.join(failed)}", "errors": failed}
    apart = list(differences(theirs["seen"], ours["seen"]))
    return {**facts, "outcome": "differs" if apart else "the same", "compared": len(theirs["seen"]), "apart": apart}


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    rows = [
        f"| {library} | {facts['version']} | {job['about']} | {job['outcome']} |"
        for library, facts in record["libraries"].items()
        for job in facts["jobs"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["beside"].items())
    return "\n".join(
        [
            "# The drop-in beside the reference, in other libraries",
            "",
            f"Each job ran twice, with peft {record['reference']} and with peft {record['dropin']}, on {versions}. What both",
            f"saw (losses, keys, outputs, files, what learns) was compared; numbers may be apart by {record['near']:g} of the",
            "largest beside them. `make test-ecosystem` runs it again.",
            "",
            "| library | version | job | outcome |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def keep(record: dict[str, Any], seconds: int) -> None:
    """Write the record; the lines of libraries that were not run stay as they were."""
    path = RESULTS / "ecosystem.json"
    before = json.loads(path.read_text())["libraries"] if path.exists() else {}
    record["libraries"] = {p: found for p in LIBRARIES.values() if (found := {**before, **record["libraries"]}.get(p))}
    path.write_text(json.dumps({**record, "seconds": seconds}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(record))


def main(only: list[str]) -> int:
    began = time.perf_counter()
    theirs, ours = environments.reference(), environments.dropin()
    print(f"environments: {time.perf_counter() - began:.0f} s")
    versions = ours.versions("peft", "graftlet", "torch", *LIBRARIES.values())
    record: dict[str, Any] = {
        "reference": theirs.versions("peft")["peft"],
        "dropin": versions["peft"],
        "beside": {name: versions[name] for name in ("graftlet", "torch")},
        "near": NEAR,
        "libraries": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for library in only or LIBRARIES:
            package = LIBRARIES[library]
            jobs = both(library, theirs, ours, Path(folder))
            record["libraries"][package] = {"version": versions[package], "jobs": jobs}
            for job in jobs:
                print(f"{package:22} {job['job']:32} {job['outcome']:12} {job['seconds']}")
                print(
                    "".join(f"    {entry}\n" for entry in [*job.get("apart", []), *job.get("errors", {}).values()]),
                    end="",
                )
    keep(record, round(time.perf_counter() - began))
    return any(job["outcome"] != "the same" for facts in record["libraries"].values() for job in facts["jobs"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
