# SPDX-License-Identifier: Apache-2.0
"""The page of what was measured on a GPU, from the JSON files beside it: `python benchmarks/gpu/tables.py`.

Writes benchmarks/results/gpu.md from training-step.json, quantised-gpu.json, several-gpu.json and serving.json there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def loaded(name: str) -> dict[str, Any] | None:
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def where(found: dict[str, Any]) -> str:
    facts = f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}"
    return f"{facts}, graftlet {found['graftlet']}, {found['date']}."


def by_what(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        table.setdefault(row["what"], {})[row["who"]] = row
    return table


def opening(title: str, said: str, facts: str, *columns: str) -> Iterator[str]:
    """A part's beginning, to where its rows follow; the first column is words, the others numbers."""
    yield f"\n## {title}\n"
    yield f"{said}\n"
    yield f"{facts}\n"
    yield from head(*columns)


def head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"


RUNS = (
    "Medians and, in brackets, the least: other work on the host makes single steps longer, and with them the medians of cases "
    "in which the device waits for it."
)


def steps(found: dict[str, Any]) -> Iterator[str]:
    said = (
        "Llama of 8B shape with 16 layers, bf16, 2 x 2,048 tokens, adapters on all linear layers: forward, backward, AdamW. "
        + RUNS
    )
    columns = ("what", "Graftlet", "reference", "ratio", "Graftlet's peak", "reference's")
    yield from opening("A training step", said, where(found), *columns)
    for what, who in by_what(found["rows"]).items():
        ours, theirs = who.get("graftlet") or who.get("base"), who.get("reference")
        assert ours is not None
        other = ["", ""] if theirs is None else [took(theirs), f"{ours['ms'] / theirs['ms']:.2f}"]
        peak = "" if theirs is None else f"{theirs['GB']:.1f} GB"
        yield f"| {what} | {took(ours)} | {' | '.join(other)} | {ours['GB']:.1f} GB | {peak} |"


def took(row: dict[str, Any], of: str = "") -> str:
    """The median, and the least."""
    return f"{row[f'{of}ms']:.0f} ({row['least ms' if of else 'least']:.0f}) ms"


def quantised(found: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    said = "The same shape, its linear layers NF4 with double quantisation, adapters of r=16. " + RUNS
    columns = (
        "how",
        "frozen base",
        "Graftlet",
        "optimised",
        "reference",
        "Graftlet's peak",
        "optimised",
        "reference's",
    )
    yield from opening("A training step on 4 bits", said, f"{found['device']}, {versions}, {found['date']}.", *columns)
    whose = ("base", "graftlet", "graftlet, optimised", "reference")
    for how in dict.fromkeys(name.partition(", ")[2].removeprefix("optimised, ") for name in found["speed"]):
        rows = [found["speed"][f"{who}, {how}"] for who in whose]
        times = " | ".join(took(row, "step ") for row in rows)
        peaks = " | ".join(f"{row['peak GiB'] * 2**30 / 1e9:.1f} GB" for row in rows[1:])
        yield f"| {how} | {times} | {peaks} |"


def several(found: dict[str, Any]) -> Iterator[str]:
    said = "Each beside one GPU that sees all rows: a small Llama in single precision, r=16 on all linear layers, three steps."
    columns = ("what", "off from one GPU's adapter, as a share of what it learned")
    yield from opening("Several GPUs", said, where(found), *columns)
    for row in found["compared"]:
        yield f"| {row['what']} | {row['off']:.0e} |"
    yield "\nA step of a Llama of 8B shape with 8 layers, bf16, 2 x 2,048 tokens a GPU; the peak is the first GPU's.\n"
    yield from head("how", "step", "peak")
    for row in found["rows"]:
        yield f"| {row['what']} | {row['ms']:.0f} ms | {row['GB']:.1f} GB |"


def serving(found: dict[str, Any]) -> Iterator[str]:
    said = "The same model; 32 adapters of r=16 for mixed batches, r=64 (335 MB) for files."
    yield from opening("Many adapters, files, merging", said, where(found), "what", "Graftlet", "reference", "ratio")
    for what, who in by_what(found["rows"]).items():
        ours, theirs = who.get("graftlet"), who.get("reference")
        if ours is None:
            continue
        other = ["", ""] if theirs is None else [f"{1000 * theirs['s']:.1f} ms", f"{ours['s'] / theirs['s']:.2f}"]
        yield f"| {what} | {1000 * ours['s']:.1f} ms | {other[0]} | {other[1]} |"


def page() -> str:
    lines = ["# Measured on a GPU"]
    parts = {"training-step": steps, "quantised-gpu": quantised, "several-gpu": several, "serving": serving}
    for name, part in parts.items():
        if (found := loaded(f"{name}.json")) is not None:
            lines += part(found)
    lines.append(
        "\nMade by `python benchmarks/gpu/tables.py` from the JSON files beside it; scripts: `benchmarks/gpu/`."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    (RESULTS / "gpu.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
