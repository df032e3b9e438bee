# SPDX-License-Identifier: Apache-2.0
"""`graftlet survey`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ..knowledge.survey.findings import KINDS
from ..knowledge.survey.surveying import Survey, write
from ..knowledge.survey.surveying import survey as surveyed


def survey(path: Path, out: Path | None, form: str, overwrite: bool, as_json: bool) -> None:
    """Show what was found in a repository, and write its pages where `out` names a folder."""
    found = surveyed(path)
    done = None if out is None else write(found, out, form, overwrite)
    if as_json:
        typer.echo(json.dumps(_facts(found), indent=2))
        return
    console = Console(highlight=False)
    table = Table("found", box=None, header_style="dim")
    table.add_column("", justify="right")
    for kind, count in found.count().most_common():
        table.add_row(KINDS[kind], str(count))
    console.print(table)
    if found.left_out:
        console.print(f"left out: {len(found.left_out)} files (see the index)", soft_wrap=True)
    if done is None:
        console.print(f"{len(found.pages)} pages; write them with --out FOLDER", soft_wrap=True)
        return
    kept = f", {len(done.kept)} kept since they were edited" if done.kept else ""
    console.print(f"{out}: {len(done.written)} pages written, {len(done.same)} as they were{kept}", soft_wrap=True)


def _facts(found: Survey) -> dict:
    return {
        "findings": [asdict(f) for f in found.findings],
        "pages": [{"kind": p.kind, "name": p.name, "title": p.title, "findings": len(p.findings)} for p in found.pages],
        "left_out": [{"file": name, "why": why} for name, why in found.left_out],
    }
