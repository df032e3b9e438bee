# SPDX-License-Identifier: Apache-2.0
"""`graftlet methods`."""

from __future__ import annotations

import json
from dataclasses import fields

import typer
from rich.console import Console
from rich.table import Table

from ..config import PeftConfig
from ..registry import Entry, entries


def methods(as_json: bool) -> None:
    """Show the registry: every method, what it works on, and its own fields."""
    known = list(entries())
    if as_json:
        typer.echo(json.dumps([_facts(e) for e in known], indent=2))
        return
    table = Table("method", "works on", "what it is", box=None, header_style="dim")
    for entry in known:
        facts = _facts(entry)
        table.add_row(facts["method"], ", ".join(facts["sites"]) or "the model", facts["summary"].split("   ")[0])
    Console(highlight=False).print(table)


def _facts(entry: Entry) -> dict:
    common = {f.name for f in fields(PeftConfig)}
    return {
        "method": entry.name,
        "summary": entry.summary,
        "sites": [s.__name__ for s in entry.sites],
        "config": entry.config.__name__,
        "fields": [f.name for f in fields(entry.config) if f.name not in common],
    }
