# SPDX-License-Identifier: Apache-2.0
"""`graftlet doctor` and `graftlet explain`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from ..knowledge.advice import Advice, advise
from ..knowledge.book import find, of_kind, plain
from ..knowledge.doctor import Diagnosis, diagnose
from ..knowledge.page import KINDS

if TYPE_CHECKING:
    from ..train.recipe import Recipe

COLOURS = {"works": "green", "absent": "yellow", "broken": "red"}


def explain(name: str | None) -> None:
    """Show a page, or the names of all."""
    console = Console(highlight=False)
    if name is not None:
        console.print(Markdown(plain(find(name))))
        return
    for kind, title in KINDS.items():
        if kind in ("code", "environment", "heuristic"):
            table = Table(title.lower(), "", box=None, header_style="dim")
            for page in of_kind(kind):
                table.add_row(page.name, page.title)
            console.print(table, "")


def doctor(recipe: Path | None, feature: str | None, as_json: bool) -> None:
    """Show what works here, and what a recipe should know; exit status 1 where what is asked for does not work."""
    found = diagnose(feature)
    told = () if recipe is None else advise(_loaded(recipe))
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "advice": [a.as_dict() for a in told]}, indent=2))
    else:
        _show(found, told)
    if not found.well:
        raise typer.Exit(1)


def tell(recipe: Recipe) -> None:
    """One line for each heuristic that applies to a run, before it starts."""
    if os.environ.get("RANK", "0") != "0":  # of several processes, which have not met yet, the first one talks
        return
    console = Console(highlight=False)
    for advice in advise(recipe):
        console.print(f"note: {advice}", soft_wrap=True, markup=False)


def _loaded(recipe: Path) -> Recipe:
    from ..train.recipe import load_recipe

    return load_recipe(recipe, [])


def _show(found: Diagnosis, told: tuple[Advice, ...]) -> None:
    console = Console(highlight=False)
    for ward in found.wards:
        table = Table("", ward.environment.title, "", "", box=None, header_style="bold", pad_edge=False)
        for finding in ward.findings:
            state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
            table.add_row(state, finding.feature.title.replace("`", ""), finding.why, finding.command)
        console.print(table, "")
    for advice in told:
        console.print(f"note: {advice}", soft_wrap=True, markup=False)
