# SPDX-License-Identifier: Apache-2.0
"""`graftlet convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..config import CONFIG_NAME
from ..errors import CallError
from ..serve.convert import SHARE, Fit, converted, write
from ..train.adapter import open_adapter

ADAPTERS = (CONFIG_NAME, "pytorch_lora_weights.safetensors", "adapter.gguf")
"""What may be in a folder that holds an adapter."""


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
    share = wanted(rank, energy) or SHARE
    check_place(out, overwrite)
    console = Console(highlight=False)
    opened = open_adapter(adapter, base=base, dtype=dtype, device=device, report=console.print)
    made = converted(opened.model, share, opened.model.active_adapter, progressbar=True)
    write(made, out)
    console.print(table(made.layers))
    size = sum(t.numel() for t in made.tensors.values())
    console.print(f"{out}/: LoRA, {size:,} parameters", soft_wrap=True)


def wanted(rank: int | None, energy: float | None) -> float | None:
    """The rank, or the share to keep, that was asked for. Raises `CallError` for both."""
    if rank is not None and energy is not None:
        raise CallError("--rank and --energy do not go together: one rank for all, or each layer's own.")
    return rank or energy


def check_place(out: Path, overwrite: bool) -> None:
    """Raise `CallError` where a folder is taken by something else than an adapter that may be replaced."""
    replaceable = overwrite and any((out / name).is_file() for name in ADAPTERS)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not replaceable):
        raise CallError(f"{out} is taken; choose another folder, or replace an adapter there with --overwrite.")


def table(layers: Mapping[str, Fit]) -> Table:
    """How each layer came out."""
    table = Table("layer", box=None, header_style="dim")
    for name in ("rank", "lost"):
        table.add_column(name, justify="right")
    for path, fit in layers.items():
        table.add_row(path, str(fit.rank), f"{fit.error:.2%}")
    return table
