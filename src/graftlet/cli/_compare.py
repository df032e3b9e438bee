# SPDX-License-Identifier: Apache-2.0
"""`graftlet compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..files import write_atomically
from ..train.runs import differing, figures, read_runs, runs_page


def compare(folders: Sequence[str], html: Path | None, as_json: bool) -> None:
    """Show the figures of several runs and where their recipes differ, and write the page with the curves."""
    runs = read_runs(folders)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, runs_page(runs).encode())
    measured, settings = figures(runs), differing(runs)
    if as_json:
        typer.echo(json.dumps({"measured": measured, "settings": settings}, indent=2))
        return
    console = Console(highlight=False)
    console.print(_table("measured", list(runs), measured))
    if settings:
        console.print(_table("setting", list(runs), settings))
    if html is not None:
        console.print(f"page: {html}", soft_wrap=True)


def _table(title: str, names: list[str], rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title, *names, box=None, header_style="dim")
    for what, row in rows.items():
        table.add_row(what, *("" if row.get(n) is None else str(row[n]) for n in names))
    return table
