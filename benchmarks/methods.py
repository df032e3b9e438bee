# SPDX-License-Identifier: Apache-2.0
"""Every method on one task under one budget: SMS spam, as in `examples/recipes/sms-spam.toml`, the same data and steps for all.

    python benchmarks/methods.py                     every method, all learning rates: some hours on two CPU cores
    python benchmarks/methods.py --budget quick      ten steps each, one rate: to see that all of it works
    python benchmarks/methods.py --only lora,ia3 --set training.max_steps=2

Each run has a process of its own. What has a result is not run again: an interrupted command goes on where it was. The
results, `benchmarks/results/methods.json`, are written after each run, and from them a table (`methods.md`), a chart
(`methods.png`) and, for the full budget, the page `docs/methods-compared.md` with the chart beside it. What is trained with
stands in `methods.toml`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from graftlet import __version__
from graftlet.files import write_atomically
from graftlet.registry import entries, lookup
from graftlet.train.locate import parse
from graftlet.train.recipe import check, load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPE = ROOT / "examples" / "recipes" / "sms-spam.toml"
PAGE = ROOT / "docs" / "methods-compared.md"
PLAN = parse((HERE / "methods.toml").read_text(encoding="utf-8"))

Run = dict[str, Any]
"""One run: row, method, rate, and what was measured."""


# what is run


def rows() -> dict[str, dict[str, Any]]:
    """All rows by name: those of the plan, and each registered method that it does not speak of."""
    planned = {name: {"method": name, **table} for name, table in PLAN["rows"].items()}
    rest = [e.name.lower() for e in entries() if e.name.lower() not in planned | PLAN["left_out"]]
    return dict(sorted({**planned, **{name: {"method": name} for name in rest}}.items()))


def adapter(row: dict[str, Any]) -> dict[str, Any]:
    """The recipe's `[adapter]` of a row."""
    known = {f.name for f in dataclasses.fields(lookup(row["method"]).config)}
    targets = {"target_modules": PLAN["targets"]} if "target_modules" in known else {}
    return {**targets, **{k: v for k, v in row.items() if k != "rates"}}


def recipe(row: dict[str, Any], rate: float, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe of one run, as plain values; the folder for its output is still to be named."""
    threads = torch.get_num_threads()  # the same for all, however busy the machine is
    common = ["evaluation.verify=false", "evaluation.samples=0", f"model.threads={threads}"]
    common.append(f"training.learning_rate={rate}")
    values = load_recipe(RECIPE, [*common, *overrides]).model_dump(mode="json", exclude_unset=True)
    return {**values, "title": row["method"], "adapter": adapter(row)}


def wanted(only: Sequence[str], first_rate: bool) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Name, row and learning rate of every run."""
    known = rows()
    if unknown := sorted(set(only) - known.keys()):
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}.")
    for name, row in known.items():
        if not only or name in only:
            rates = row.get("rates", PLAN["rates"])
            yield from ((name, row, rate) for rate in (rates[:1] if first_rate else rates))


def carry_out(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `summary.json`, from a process of its own; `RuntimeError` with the end of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "recipe"), Path(folder, "run")
        file.write_text(json.dumps({**values, "output": str(output)}))
        done = subprocess.run([sys.executable, __file__, "--child", str(file)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return json.loads((output / "summary.json").read_text())


def child(file: str) -> None:
    """The other end of `carry_out`."""
    from graftlet.train import train

    train(check(json.loads(Path(file).read_text())))


def measured(name: str, rate: float, summary: dict[str, Any]) -> Run:
    """What is kept of a run."""
    before, after = summary["measured"][:2]
    return {
        "row": name,
        "method": summary["adapter"]["method"],
        "rate": rate,
        "metric": after["metric"],
        "metric_before": before["metric"],
        "validation_loss": after["validation_loss"],
        "seconds": summary["seconds"]["train"],
        "peak_memory": summary["training"]["peak_memory"],
        "bytes": summary["adapter"]["bytes"],
        "trainable": summary["adapter"]["trainable"],
        "steps": summary["training"]["steps"],
        "device": summary["model"]["device"],
        "threads": summary["model"]["threads"],
    }


# results


def opened(file: Path, budget: list[str]) -> dict[str, Any]:
    """The results so far. Those of another budget are refused: rows are compared with each other."""
    if not file.exists():
        return {"graftlet": __version__, "torch": torch.__version__, "budget": budget, "runs": [], "failed": {}}
    found = json.loads(file.read_text())
    if found["budget"] != budget:
        raise SystemExit(f"{file} has results for {found['budget']}, not {budget}; move it away, or give --results.")
    return found


def best(runs: Sequence[Run]) -> list[Run]:
    """Of each row the run with the lowest validation loss, the most accurate first, then the smallest file."""
    chosen: dict[str, Run] = {}
    for run in sorted(runs, key=lambda r: r["validation_loss"]):
        chosen.setdefault(run["row"], run)
    return sorted(chosen.values(), key=lambda r: (-r["metric"], r["bytes"]))


def front(runs: Sequence[Run], cost: str) -> list[Run]:
    """The runs that none is better than at the same `cost` or less, from the cheapest."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda r: (r[cost], -r["metric"])):
        if not found or run["metric"] > found[-1]["metric"]:
            found.append(run)
    return found


def table(results: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    chosen = best(results["runs"])
    heads = ("row", "right", "validation loss", "training", "peak memory", "file", "trainable", "learning rate")
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for r in chosen:
        size = f"{r['seconds']:.0f} s | {r['peak_memory'] / 2**20:,.0f} MiB | {r['bytes'] / 2**10:,.0f} KiB"
        score = f"{r['metric']:.1%} | {r['validation_loss']:.4f}"
        lines.append(f"| {r['row']} | {score} | {size} | {r['trainable']:,} | {r['rate']:g} |")
    left = {**PLAN["left_out"], **results["failed"]}
    notes = [f"- {name}: {why}" for name, why in sorted(left.items())]
    return "\n".join([*lines, "", "Not in the table:", "", *notes])


def page(results: dict[str, Any]) -> str:
    """The page around the table."""
    one = best(results["runs"])[0]
    where = f"{one['device']}, {one['threads']} threads" if one["device"] == "cpu" else one["device"]
    return (
        "# Methods compared\n\n"
        f"SMS spam with SmolLM2-135M-Instruct, {one['steps']} steps of 8 messages for every method, on {where}, "
        f"torch {results['torch']}. Of each method's learning rates the one with the lowest validation loss is shown; "
        f"the share of test messages told right was {one['metric_before']:.1%} before training. One small task and one "
        "seed: a difference of some points between two rows says little.\n\n"
        "![Accuracy by file size and by training time](methods-compared.png)\n\n"
        f"{table(results)}\n\n"
        "Made by `python benchmarks/methods.py`; settings: `benchmarks/methods.toml`.\n"
    )


def chart(runs: Sequence[Run], file: Path) -> None:
    """Accuracy by file size and by time; the line joins what nothing beats at that cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost, unit, name in ((left, "bytes", 1024, "file, KiB"), (right, "seconds", 1, "training, seconds")):
        line = front(runs, cost)
        axes.scatter([r[cost] / unit for r in runs], [r["metric"] for r in runs], s=18, color="#9ca3af")
        axes.plot(
            [r[cost] / unit for r in line], [r["metric"] for r in line], color="#0f766e", marker="o", markersize=5
        )
        for run in runs:
            size = {"fontsize": 8, "color": "#0f766e"} if run in line else {"fontsize": 6, "color": "#6b7280"}
            axes.annotate(run["row"], (run[cost] / unit, run["metric"]), (3, 4), textcoords="offset points", **size)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("share of test messages told right")
    figure.savefig(file, dpi=140)


def publish(results: dict[str, Any], file: Path, docs: Path | None) -> None:
    """Write the results with their table and chart, and the page of the docs."""
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    if results["runs"]:
        chart(best(results["runs"]), file.with_suffix(".png"))
        write_atomically(file.with_suffix(".md"), (table(results) + "\n").encode())
        if docs is not None:
            write_atomically(docs, page(results).encode())
            shutil.copy(file.with_suffix(".png"), docs.with_suffix(".png"))


def attempt(results: dict[str, Any], name: str, row: dict[str, Any], rate: float) -> str:
    """Run once and put down what came of it; a line that says so."""
    try:
        run = measured(name, rate, carry_out(recipe(row, rate, results["budget"])))
    except RuntimeError as why:
        results["failed"][name] = f"failed at learning rate {rate:g}: {why}"
        return f"{name} {results['failed'][name]}"
    results["runs"].append(run)
    results["failed"].pop(name, None)
    return f"{name} at {rate:g}: {run['metric']:.1%} right, {run['seconds']:.0f} s"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=sorted(PLAN["budgets"]), default="full")
    parser.add_argument("--only", default="", help="rows, comma-separated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe's key, for all runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder for the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = options()
    if given.child:
        return child(given.child)
    full = given.budget == "full"
    budget = [*(f"{k}={v}" for k, v in PLAN["budgets"][given.budget].items()), *given.set]
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / ("methods.json" if full else f"methods-{given.budget}.json")
    results = opened(file, budget)
    done = {(r["row"], r["rate"]) for r in results["runs"]}
    for name, row, rate in wanted([n for n in given.only.split(",") if n], first_rate=not full):
        if (name, rate) not in done:
            print(attempt(results, name, row, rate), flush=True)
            publish(results, file, PAGE if full and not given.set else None)
    return None


if __name__ == "__main__":
    main()
