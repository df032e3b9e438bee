# SPDX-License-Identifier: Apache-2.0
"""The report of a run: `summary.json` as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .anatomy import maps
from .callbacks import clock
from .page import folded, page, paragraph, said, section, table, tiles
from .plots import loss_curve, overlaid
from .score import named, shown

Summary = dict[str, Any]


def write_report(summary: Summary, path: Path) -> None:
    """Write the page of a summary."""
    write_atomically(path, report(summary).encode())


def report(summary: Summary) -> str:
    """The page of a summary."""
    model, adapter = summary["model"], summary["adapter"]
    intro = (
        f"{adapter['method']} on {model['source']}: {adapter['trainable']:,} of "
        f"{model['parameters'] + adapter['trainable']:,} parameters trained ({adapter['share']:.2%})."
    )
    parts = [
        paragraph(intro, soft=True),
        tiles(_figures(summary)),
        section("Before and after", _measured(summary), *_notes(summary)),
        section(
            "Loss", loss_curve(summary["history"], summary["measured"], summary["training"]["steps"], unit(summary))
        ),
        *_rate(summary["history"]),
        *(section(title, chart) for title, chart in maps(summary.get("layers", []))),
        section("Data", _data(summary)),
        *([section("Answers", *map(_sample, summary["samples"]))] if summary["samples"] else []),
        section("Time", _time(summary)),
        section("Set-up", _setup(summary), folded("The whole recipe", json.dumps(summary["recipe"], indent=2))),
    ]
    return page(summary["title"], *parts)


def _rate(history: Sequence[dict[str, Any]]) -> list[str]:
    """The learning rate by step, where it was logged."""
    rates = rate_of(history)
    return [section("Learning rate", overlaid({"": rates}, "learning rate"))] if rates else []


def rate_of(history: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Steps and learning rates of a Trainer's log history."""
    return [(h["step"], h["learning_rate"]) for h in history if "learning_rate" in h]


def _figures(summary: Summary) -> list[tuple[str, str]]:
    before, after = summary["measured"][:2]
    figures = []
    if "metric" in after:
        values = (shown(summary["metric"], m["metric"]) for m in (before, after))
        figures.append((" → ".join(values), f"{named(summary['metric'])}, held-out"))
    losses = [f"{m['validation_loss']:.3f}" for m in (before, after) if m["validation_loss"] is not None]
    if losses:
        figures.append((" → ".join(losses), "validation loss"))
    return [
        *figures,
        (f"{summary['adapter']['bytes'] / 2**20:.1f} MiB", "size of the adapter"),
        (clock(summary["seconds"]["train"]), "training time"),
    ]


def unit(summary: Summary) -> str:
    """What the loss is a mean over; runs of old say nothing of it."""
    return summary.get("unit", "token")


def _measured(summary: Summary) -> str:
    scored = summary["metric"] != "none"
    head = ["model", *([named(summary["metric"]), "right", "same answers"] if scored else []), "validation loss"]
    rows = []
    for entry in summary["measured"]:
        cells = [{"before": "base, without the adapter"}.get(entry["stage"], entry["stage"])]
        if scored:
            same = f"{entry['same_answers']} of {entry['of']}" if "same_answers" in entry else ""
            right = f"{entry['right']} of {entry['of']}" if "right" in entry else ""
            cells += [shown(summary["metric"], entry["metric"]), right, same]
        loss = entry["validation_loss"]
        rows.append([*cells, "" if loss is None else f"{loss:.4f}"])
    return table(head, rows, numbers=len(head) - 1, marked=1)


def _notes(summary: Summary) -> list[str]:
    notes = []
    if summary["metric"] != "none":
        notes.append(f"Measured on {summary['measured'][0]['of']} examples that were not trained on.")
    moved = [m for m in summary["measured"] if m.get("same_answers", m.get("of")) != m.get("of")]
    if moved:
        dtype = summary["model"]["dtype"]
        notes.append(f"Answers that changed were near ties: merging rounds base plus adapter to {dtype}.")
    best = summary["training"]["best_step"]
    if best is not None:
        notes.append(f"The adapter kept is the one of step {best}, which had the lowest validation loss.")
    return [paragraph(" ".join(notes), soft=True)] if notes else []


def _data(summary: Summary) -> str:
    data = summary["data"]
    use = {"train": "trained on", "validation": "held out: validation loss", "test": "held out: measurement"}
    rows = []
    for name, words in use.items():
        part = data[name]
        if part["examples"]:
            groups = ", ".join(f"{g} {n}" for g, n in part["groups"].items())
            long = str(part["too_long"])
            rows.append([words, groups, f"{part['examples']:,}", long, f"{part['tokens']:,}"])
    sources = data["sources"] if isinstance(data["sources"], list) else [data["sources"]]
    told = (
        f"{', '.join(sources)}: {data['rows']:,} rows, {data['filtered']:,} filtered out, "
        f"{data['doubles']:,} doubles left out. The parts have no question in common."
    )
    if "labels" in data:
        told += f" {_labels(data['labels'])}"
    return table(["part", "of which", "examples", "too long", "tokens"], rows, numbers=3) + paragraph(told, soft=True)


def _labels(names: Sequence[str]) -> str:
    return f"{len(names)} labels: {', '.join(names)}." if names else "The labels are amounts."


def _sample(sample: dict[str, str]) -> str:
    names = {"prompt": "asked", "expected": "right", "before": "before", "after": "after"}
    return said((words, sample[name]) for name, words in names.items())


def _time(summary: Summary) -> str:
    seconds = summary["seconds"]
    rows = [[name, clock(value)] for name, value in seconds.items() if name != "total"]
    return table(["part", "time"], [*rows, ["in all", clock(seconds["total"])]], numbers=1, marked=len(rows))


def _setup(summary: Summary) -> str:
    model, training, recipe = summary["model"], summary["training"], summary["recipe"]
    speed = training["tokens_a_second"]
    facts = {
        "base": f"{model['source']}, {model['parameters']:,} parameters",
        "numbers": f"{model['dtype']} on {model['device']}, {model['threads']} CPU threads",
        "adapter": f"{summary['adapter']['method']}, {_plain(recipe['adapter'])}",
        "steps": f"{training['steps']} of {training['planned_steps']} planned",
        "speed": f"{speed:,.0f} tokens/s" if speed else "resumed run: not measured",
        "memory": f"{training['peak_memory'] / 2**30:.2f} GiB at most",
        "seed": str(recipe["seed"]),
        "Graftlet": summary["graftlet"],
    }
    if training["resumed_from"]:
        facts["resumed"] = training["resumed_from"]
    return table(["", ""], [list(pair) for pair in facts.items()])


def _plain(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} = {v}" for k, v in values.items() if k not in ("method", "init") or (k == "init" and v is not None)
    )
