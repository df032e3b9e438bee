# SPDX-License-Identifier: Apache-2.0
"""Every page and chart of what was measured, from the JSON files in `benchmarks/results`: `python benchmarks/measured.py`.

It measures nothing, and is to be run again when one of those files has changed. It writes the tables beside them (`*.md`), the
comparisons of methods in the docs (as `methods.py --pages` does), and the page `docs/speed-measured.md` with its charts,
`docs/images/speed-*.png`.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import charts
from charts import BASE, GRAPH, OPTIMISED, OURS, REFERENCE, Panels

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
Found = dict[str, Any]
Drawn = dict[str, dict[str, dict[str, float]]]
SERIES = {"graftlet": OURS, "optimised": OPTIMISED, "reference": REFERENCE, "base": BASE}
CAPTURED = ", CUDA graph"


@dataclass(frozen=True)
class Part:
    """A part of the page, with one chart.

    source: which results, a pattern of names of which the last counts. script: what measures them. tables: their page, where
    there is one. panels: what to draw of them. draw: how.
    """

    title: str
    name: str
    source: str
    script: str
    said: str
    panels: Callable[[Found], Panels]
    draw: Callable[[Panels], Any] = charts.bars
    tables: str | None = None

    @property
    def file(self) -> Path | None:
        """The results; None where there are none."""
        return max(RESULTS.glob(f"{self.source}.json"), default=None)

    @property
    def chart(self) -> Path:
        return DOCS / "images" / f"speed-{self.name}.png"


# what is in the files


def step(found: Found) -> Panels:
    panels: Drawn = {"a step, ms": {}, "peak memory, GB": {}}
    for row in found["rows"]:
        plain = row["what"].removesuffix(f" {OPTIMISED}")
        series = SERIES[row["who"]] if plain == row["what"] else OPTIMISED
        for title, value in zip(panels, (row["ms"], row["GB"]), strict=True):
            panels[title].setdefault(plain, {})[series] = value
    return panels


def four_bits(found: Found) -> Panels:
    panels: Drawn = {"a step, ms": {}, "peak memory, GB": {}}
    for name, row in found["speed"].items():
        who, _, how = name.partition(", ")
        plain = how.removeprefix(f"{OPTIMISED}, ")
        series = SERIES[who] if plain == how else OPTIMISED
        for title, value in zip(panels, (row["step ms"], row["peak GiB"] * 2**30 / 1e9), strict=True):
            panels[title].setdefault(plain, {})[series] = value
    return panels


def mixed(found: Found) -> Panels:
    panels: Drawn = {}
    for rows, what, row in _serving(found):
        if rows:
            plain = what.removesuffix(CAPTURED)
            series = GRAPH if plain != what else BASE if plain == "base" else SERIES[row["who"]]
            table = panels.setdefault(f"{rows} {'token' if rows.endswith(' 1') else 'tokens'}, ms", {})
            table.setdefault(plain, {}).setdefault(series, 1000 * row["s"])
    return panels


def files(found: Found) -> Panels:
    table: dict[str, dict[str, float]] = {}
    for rows, what, row in _serving(found):
        if not rows:
            table.setdefault(what, {})[SERIES[row["who"]]] = 1000 * row["s"]
    return {"ms": table}


def _serving(found: Found) -> Iterator[tuple[str, str, Found]]:
    """Each row with what it says of the batch, if anything, and of what is done."""
    for row in found["rows"]:
        batch = re.fullmatch(r"(\d+ rows of \d+), (.*)", row["what"])
        yield (batch[1], batch[2], row) if batch else ("", row["what"], row)


def stack(found: Found) -> Panels:
    """Ratios to the reference, the methods in the order of their steps."""
    titles = {"forward": "forward", "step": "a step", "GB": "a step's memory", "merge": "merging"}
    rows = sorted(found["rows"], key=lambda row: _ratio(row, "step") or 0)
    panels = {
        title: {row["method"]: {OURS: r} for row in rows if (r := _ratio(row, key))} for key, title in titles.items()
    }
    return {title: table for title, table in panels.items() if table}


def _ratio(row: Found, key: str) -> float | None:
    both = row.get(key) or {}
    return both["graftlet"] / both["reference"] if both.get("graftlet") and both.get("reference") else None


def cpu_step(found: Found) -> Panels:
    titles = {"ms": "a step, ms", "peak": "the process's peak memory, MB"}
    return {title: {row["what"]: _named(row[key]) for row in found["rows"]} for key, title in titles.items()}


def many_on_cpu(found: Found) -> Panels:
    return {"ms": {row["what"]: _named(row) for row in found["rows"]}}


def _named(values: Found) -> dict[str, float]:
    return {series: values[who] for who, series in SERIES.items() if who in values}


# the page

SHAPE = "a Llama of 8B shape with 16 layers"
PARTS = [
    Part(
        "A training step",
        "step",
        "training-step",
        "gpu/training_step.py",
        f"LoRA and DoRA on all linear layers of {SHAPE} in bf16, 2 x 2,048 tokens: forward, backward, AdamW. The frozen "
        "base alone is its forward and the gradient of its input.",
        step,
        tables="gpu",
    ),
    Part(
        "A training step on 4 bits",
        "four-bits",
        "quantised-gpu",
        "gpu/quantised.py",
        "The same shape, its linear layers NF4 with double quantisation, r=16; all activations kept, or checkpointing."
        " The base alone is the frozen 4-bit model in the same setting.",
        four_bits,
        tables="gpu",
    ),
    Part(
        "Many adapters in one batch",
        "mixed",
        "serving",
        "gpu/serving.py",
        f"A forward pass of {SHAPE} for 32 rows, one token each and 128 each: the base alone, one adapter active, one adapter "
        "named for all rows, and rows of many adapters of r=16. Logarithmic. The reference cannot be captured in a CUDA graph.",
        mixed,
        charts.dots,
        "gpu",
    ),
    Part(
        "Adding, loading, saving, swapping, merging",
        "files",
        "serving",
        "gpu/serving.py",
        "The same model; r=16 for the 31 adapters that are added, r=64 (335 MB) for the rest. Logarithmic. The reference's "
        "merge is neither checked nor undone to the bit, as Graftlet's is; its svd takes minutes and was left out.",
        files,
        charts.dots,
        "gpu",
    ),
    Part(
        "Every method on a GPU",
        "methods-cuda",
        "stack-cuda",
        "stack.py",
        "Graftlet's time and memory as a share of the reference's, on a stack of linear layers: left of the line is less. "
        "Logarithmic. What only one of them can do stands in the tables. The reference's merge is neither checked nor undone "
        "to the bit, as Graftlet's is.",
        stack,
        charts.ratios,
        "stack-cuda",
    ),
    Part(
        "Every method on a CPU",
        "methods-cpu",
        "stack-cpu",
        "stack.py",
        "The same on a CPU, where memory was not measured.",
        stack,
        charts.ratios,
        "stack-cpu",
    ),
    Part(
        "A training step on a CPU",
        "step-cpu",
        "cpu-step",
        "cpu_step.py",
        "A model of SmolLM2-135M's shape in float32, r=16 on all linear layers, batch 4 x 128: forward, backward, AdamW. Each "
        "library in a process of its own; the peak is the process's, the base included.",
        cpu_step,
    ),
    Part(
        "Many adapters on a CPU",
        "many-cpu",
        "many-adapters-*",
        "many_adapters.py",
        "Switching, adding, mixing, merging and combining adapters on small models. Logarithmic.",
        many_on_cpu,
        charts.dots,
        "many-adapters-*",
    ),
]


def facts(found: Found) -> str:
    """Device, shape, versions, date."""
    versions = {**found, **found.get("versions", {})}
    named = [f"{n} {versions[n]}" for n in ("torch", "transformers", "bitsandbytes", "graftlet") if n in versions]
    other = versions.get("reference") or versions.get("peft")
    known = [found["device"], found.get("shape"), *named, other and f"PEFT {other}", found["date"]]
    return ", ".join(filter(None, known)) + "."


def gist(panels: Panels, ours: str) -> Iterator[str]:
    """Words a panel: the share of the reference's that one of ours takes, least, most and middle."""
    for title, table in panels.items():
        both = [v[ours] / v[REFERENCE] for v in table.values() if {ours, REFERENCE} <= v.keys()]
        if both:
            shares = min(both), max(both), statistics.median(both)
            low, high, middle = (f"{x:.2f}" if x > 0.01 else f"{x:.1g}" for x in shares)
            yield f"{title.rpartition(',')[0] or 'time'} {low} to {high} of the reference's (median {middle})"


def there() -> Iterator[tuple[Part, Path, Found, Panels]]:
    """The parts that something was measured for, with where that is, what it is, and what is drawn of it."""
    for part in PARTS:
        if (file := part.file) is not None:
            found = json.loads(file.read_text())
            if any((panels := part.panels(found)).values()):
                yield part, file, found, panels


def section(part: Part, file: Path, found: Found, panels: Panels) -> str:
    made = f"`benchmarks/results/{file.name}`, by `benchmarks/{part.script}`"
    pages = sorted(RESULTS.glob(f"{part.tables}.md")) if part.tables else []
    table = f"; [the numbers](../benchmarks/results/{pages[-1].name})" if pages else ""
    said = {ours: ", ".join(gist(panels, ours)) for ours in (OURS, OPTIMISED)}
    told = ". ".join(f"{ours}: {shares}" for ours, shares in said.items() if shares)
    return (
        f"## {part.title}\n\n{part.said}\n\n"
        f"![{part.title}: a chart of the numbers in {file.name}](images/{part.chart.name})\n\n"
        + (f"{told}.\n\n" if told else "")
        + f"{facts(found)} From {made}{table}.\n"
    )


def page() -> str:
    """The page of all charts."""
    return (
        "# Speed and memory, measured\n\n"
        "The reference is Hugging Face PEFT, measured in the same run as Graftlet on the same machine; medians. Shorter bars, "
        "and dots further left, are better; `optimised` is with `optimize_model(model)`. "
        "[What happens, and why](guides/speed.md); [what was tried](../benchmarks/notes.md).\n\n"
        + "\n".join(section(*part) for part in there())
        + "\nMade by `python benchmarks/measured.py` from the JSON files.\n"
    )


def tables() -> dict[Path, str]:
    """The tables beside the results, as the scripts that measure write them."""
    makers = {"stack-*": "stack", "many-adapters-*": "many_adapters"}
    made = {
        file.with_suffix(".md"): importlib.import_module(maker).page(json.loads(file.read_text()))
        for names, maker in makers.items()
        for file in RESULTS.glob(f"{names}.json")
    }
    return {**made, RESULTS / "gpu.md": importlib.import_module("tables").page()}


def main() -> None:
    methods = importlib.import_module("methods")
    for given in ("methods", "lora"):
        plan = methods.Plan.read(HERE / f"{given}.toml")
        if (file := RESULTS / f"{plan.results}.json").exists():
            methods.publish(plan, json.loads(file.read_text()), file, DOCS / plan.docs)
    for part, _, _, panels in there():
        charts.kept(part.draw(panels), part.chart)
    for file, text in {**tables(), DOCS / "speed-measured.md": page()}.items():
        file.write_text(text, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
