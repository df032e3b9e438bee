# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: their figures, their curves over one another, and the settings in which they differ."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError, CallError
from .callbacks import clock
from .page import page, paragraph, section, table
from .plots import overlaid
from .prepare import SUMMARY
from .report import rate_of, unit
from .score import named, shown

Run = dict[str, Any]

OWN = {"output", "overwrite", "resume", "title"}
"""Keys of a recipe that are a run's own, and tell nothing of how it was done."""


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Run]:
    """The summaries of several runs' folders, by a name each: the folder's, or its path where two are alike.

    Raises:
        CallError: fewer than two, or one twice. AdapterFileError: a folder holds no run.
    """
    paths = [Path(f) for f in folders]
    if len({p.resolve() for p in paths}) < max(2, len(paths)):
        raise CallError("two different runs at least are needed to compare: graftlet compare runs/a runs/b.")
    names = [p.resolve().name for p in paths]
    shown = [str(p) if names.count(n) > 1 else n for p, n in zip(paths, names, strict=True)]
    return {name: _read(path) for name, path in zip(shown, paths, strict=True)}


def _read(folder: Path) -> Run:
    path = folder / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(
            f"{folder} holds no run of `graftlet train`: {path.name} cannot be read ({error.strerror})."
        ) from error
    except ValueError as error:
        raise AdapterFileError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict) or not {"recipe", "measured", "history", "training"} <= found.keys():
        raise AdapterFileError(f"{path} is no summary of a run.")
    return found


def figures(runs: dict[str, Run]) -> dict[str, dict[str, str]]:
    """What was measured of each run, by what it is; a figure that no run has is left out."""
    rows: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        for label, value in _figures(run).items():
            rows.setdefault(label, {})[name] = value
    return rows


def _figures(run: Run) -> dict[str, str]:
    before, after = (run["measured"][i] for i in (0, 1))
    found = {
        "method": run["adapter"]["method"],
        "trained parameters": f"{run['adapter']['trainable']:,}",
        "size": f"{run['adapter']['bytes'] / 2**20:.2f} MiB",
        "steps": str(run["training"]["steps"]),
        "time to train": clock(run["seconds"]["train"]),
        "memory": f"{run['training']['peak_memory'] / 2**30:.2f} GiB",
    }
    if after["validation_loss"] is not None:
        found["validation loss"] = f"{before['validation_loss']:.4f} → {after['validation_loss']:.4f}"
    if "metric" in after:
        found[named(run["metric"])] = " → ".join(shown(run["metric"], m["metric"]) for m in (before, after))
    return found


def differing(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """The keys of the recipes whose values differ, with each run's value; None where it has no such key."""
    flat = {name: _flat(run["recipe"]) for name, run in runs.items()}
    keys = sorted({key for values in flat.values() for key in values} - OWN)
    rows = {key: {name: values.get(key) for name, values in flat.items()} for key in keys}
    return {key: row for key, row in rows.items() if len({json.dumps(v, sort_keys=True) for v in row.values()}) > 1}


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value})
    return found


def runs_page(runs: dict[str, Run]) -> str:
    """The comparison as one HTML page."""
    names = list(runs)
    intro = f"{len(names)} runs: {', '.join(run['title'] for run in runs.values())}"
    loss = "loss a " + " or ".join(dict.fromkeys(unit(run) for run in runs.values()))
    curves = [
        section(title, overlaid(found, label, zero=zero))
        for title, label, zero, found in (
            ("Training loss", loss, False, {n: _series(r, "loss") for n, r in runs.items()}),
            ("Validation loss", loss, False, {n: held_out(r) for n, r in runs.items()}),
            ("Learning rate", "learning rate", True, {n: rate_of(r["history"]) for n, r in runs.items()}),
        )
        if any(found.values())
    ]
    measured = table(["", *names], [[what, *(row.get(n, "") for n in names)] for what, row in figures(runs).items()])
    rows = [[key, *("" if row[n] is None else _told(row[n]) for n in names)] for key, row in differing(runs).items()]
    settings = table(["setting", *names], rows) if rows else paragraph("The recipes are alike.", soft=True)
    return page(
        "Runs compared",
        paragraph(intro, soft=True),
        section("Measured", measured),
        *curves,
        section("Where the recipes differ", settings),
    )


def held_out(run: Run) -> list[tuple[float, float]]:
    """Steps and validation losses: before, while it was trained, and after."""
    ends = dict(zip((0, run["training"]["steps"]), (m["validation_loss"] for m in run["measured"][:2]), strict=False))
    known = {step: loss for step, loss in ends.items() if loss is not None}
    return sorted((known | dict(_series(run, "eval_loss"))).items())


def _series(run: Run, key: str) -> list[tuple[float, float]]:
    return [(h["step"], h[key]) for h in run["history"] if key in h]


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
