# SPDX-License-Identifier: Apache-2.0
"""`graftlet plan`, and what `graftlet train --dry-run` shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ..knowledge.cost.estimating import PARTS, Estimate, Lever
from ..knowledge.cost.recipe import estimate_recipe
from ..train.recipe import load_recipe

PART_NAMES = {
    "weights": "base weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimiser": "optimiser state",
    "activations": "kept for backward",
    "logits": "logits",
    "workspace": "for a moment",
}


def plan(recipe: Path, overrides: Sequence[str], device: str | None, as_json: bool) -> None:
    """Show what a recipe's training takes, as tables or as JSON. Nothing is loaded."""
    checked = load_recipe(recipe, overrides)
    found = estimate_recipe(checked, device)
    if as_json:
        typer.echo(json.dumps({"recipe": str(recipe), **found.to_dict()}, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{checked.title or recipe.stem}[/bold]", soft_wrap=True)
    show(console, found)


def show(console: Console, found: Estimate) -> None:
    """The estimate as tables: what, memory by part, what would help, and the time."""
    setup = found.setup
    model = type(setup.config).__name__.removesuffix("Config")
    method = "all weights" if setup.adapter is None else str(setup.adapter.peft_type)
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "model", f"{model}, {found.parameters:,} parameters, {str(setup.dtype).removeprefix('torch.')}{_kept(found)}"
    )
    facts.add_row("adapter", f"{method}, {found.trainable:,} learn ({found.trainable / found.parameters:.2%})")
    rows = f"{setup.batch} x {setup.sequence} tokens"
    facts.add_row("step", rows + (f", {setup.accumulation} times" if setup.accumulation > 1 else ""))
    facts.add_row("device", f"{found.device.name}, {size(found.device.room)} for tensors")
    console.print(facts)
    console.print(_memory(found))
    _say_fit(console, found)
    console.print(_levers(found.levers, found))
    _say_time(console, found)


def _kept(found: Estimate) -> str:
    return f", linear layers in {found.setup.quantisation}" if found.setup.quantisation else ""


def _memory(found: Estimate) -> Table:
    table = Table("memory at the peak", box=None, header_style="dim", show_footer=True)
    table.columns[0].footer = f"all, in the {found.memory.phase}"
    table.add_column("", justify="right", footer=size(found.peak))
    for part in PARTS:
        table.add_row(PART_NAMES[part], size(getattr(found.memory, part)))
    return table


def _say_fit(console: Console, found: Estimate) -> None:
    if found.fits:
        console.print(f"[green]fits[/green]: {size(found.device.room - found.peak)} are left", soft_wrap=True)
        return
    console.print(f"[red]does not fit[/red]: {size(found.peak - found.device.room)} are missing", soft_wrap=True)
    together = found.fitting()
    if together:
        does = "; ".join(lever.said for lever in together)
        console.print(f"it would with: {does} ({size(together[-1].peak)})", soft_wrap=True, markup=False)
    else:
        console.print("nothing here makes it fit: a smaller base, or several devices", soft_wrap=True)


def _levers(levers: Sequence[Lever], found: Estimate) -> Table:
    table = Table("what would change", box=None, header_style="dim")
    for name in ("peak", "less", "step", ""):
        table.add_column(name, justify="right" if name else "left")
    for lever in levers:
        times = lever.seconds / found.time.likely if found.time.likely else 1.0
        less = f"{lever.saved / found.peak:.0%}"
        table.add_row(lever.said, size(lever.peak), less, f"x {times:.2f}", "" if lever.fits else "does not fit")
    return table


def _say_time(console: Console, found: Estimate) -> None:
    time = found.time
    console.print(
        f"a step takes {duration(time.least)} at least, likely {duration(time.likely)} "
        f"({found.tokens / time.likely:,.0f} tokens/s; products {time.products / time.least:.0%} of it)",
        soft_wrap=True,
    )
    traffic = found.traffic(2)
    console.print(
        f"each of 2 data-parallel workers sends {size(traffic.adapter)} a step; training all weights, {size(traffic.full)}",
        soft_wrap=True,
    )


def size(count: float) -> str:
    """Bytes for people: `27.9 GB`."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people: `175 ms`."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
