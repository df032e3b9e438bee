# SPDX-License-Identifier: Apache-2.0
"""`graftlet inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ..files import write_atomically
from ..train.anatomy import Facts, anatomy_page, read_anatomy
from ..train.comparison import compared


def inspect(adapter: str, as_json: bool, html: Path | None) -> None:
    """Show an adapter's facts as a table, or as JSON, and write them as a page where `html` names one."""
    facts = read_anatomy(adapter)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, anatomy_page(facts).encode())
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False)
    _show(console, facts)
    if html is not None:
        console.print(f"page: {html}", soft_wrap=True)


def compare(first: str, second: str, as_json: bool) -> None:
    """Show where two adapters differ, as tables or as JSON."""
    facts = compared(first, second)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False)
    if facts["settings"]:
        table = Table("setting", facts["first"], facts["second"], box=None, header_style="dim")
        for name, values in facts["settings"].items():
            table.add_row(name, *map(str, values))
        console.print(table)
    table = Table("layer", box=None, header_style="dim")
    for name in ("‖ΔW‖ first", "second", "apart", "alike"):
        table.add_column(name, justify="right")
    for x in facts["layers"]:
        figures = [x[n] for n in ("norm_first", "norm_second", "distance", "cosine")]
        table.add_row(x["name"], *("-" if f is None else f"{f:.4g}" for f in figures))
    console.print(table)


def _show(console: Console, facts: Facts) -> None:
    head = Table.grid(padding=(0, 2))
    for name, value in (
        ("adapter", facts["path"]),
        ("method", facts["method"]),
        ("base", facts["base"] or "not named"),
        ("targets", _listed(facts["targets"])),
        ("size", f"{facts['parameters']:,} parameters, {facts['bytes'] / 2**20:.2f} MiB, {', '.join(facts['dtypes'])}"),
    ):
        head.add_row(f"[bold]{name}[/bold]", str(value))
    console.print(head)
    console.print(_layers(facts) if facts["layers"] else _tensors(facts))


def _listed(targets: object) -> str:
    return ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)


def _layers(facts: Facts) -> Table:
    table = Table("layer", box=None, header_style="dim")
    for name in ("rank", "scaling", "‖ΔW‖", "effective rank"):
        table.add_column(name, justify="right")
    for x in facts["layers"]:
        table.add_row(
            x["name"], str(x["rank"]), f"{x['scaling']:.4g}", f"{x['norm']:.4g}", f"{x['effective_rank']:.2f}"
        )
    return table


def _tensors(facts: Facts) -> Table:
    table = Table("tensor", "shape", "type", box=None, header_style="dim")
    table.add_column("norm", justify="right")
    for t in facts["tensors"]:
        shape = "×".join(map(str, t["shape"]))
        table.add_row(t["name"], shape, t["dtype"], "" if t["norm"] is None else f"{t['norm']:.4g}")
    return table
