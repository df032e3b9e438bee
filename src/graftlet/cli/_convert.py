# SPDX-License-Identifier: Apache-2.0
"""`graftlet convert`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..config import CONFIG_NAME
from ..errors import CallError
from ..serve.convert import Conversion, converted, write
from ..train.adapter import open_adapter

DEFAULT_ENERGY = 0.99


def convert(
    adapter: str,
    out: Path,
    *,
    rank: int | None,
    energy: float | None,
    base: str | None,
    dtype: str | None,
    device: str,
    overwrite: bool,
) -> None:
    """Write an adapter as LoRA into `out`.

    Raises:
        CallError: `out` is taken, or both a rank and an energy are asked for.
        ConversionError: LoRA cannot stand for the adapter.
    """
    if rank is not None and energy is not None:
        raise CallError("--rank and --energy do not go together: one rank for all, or each layer's own.")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (overwrite and (out / CONFIG_NAME).is_file())):
        raise CallError(f"{out} is taken; choose another folder, or replace an adapter there with --overwrite.")
    console = Console(highlight=False)
    opened = open_adapter(adapter, base=base, dtype=dtype, device=device, report=console.print)
    made = converted(opened.model, rank or energy or DEFAULT_ENERGY, opened.model.active_adapter, progressbar=True)
    write(made, out)
    console.print(_table(made))
    size = sum(t.numel() for t in made.tensors.values())
    console.print(f"{out}/: LoRA, {size:,} parameters", soft_wrap=True)


def _table(made: Conversion) -> Table:
    table = Table("layer", box=None, header_style="dim")
    for name in ("rank", "lost"):
        table.add_column(name, justify="right")
    for path, fit in made.layers.items():
        table.add_row(path, str(fit.rank), f"{fit.error:.2%}")
    return table
