# SPDX-License-Identifier: Apache-2.0
"""`graftlet export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import PeftConfig
from ..errors import CallError
from ..serve.convert import SHARE
from ..serve.export import Exported, export, target_of
from ..serve.export.plain import obstacle
from ..train.adapter import open_adapter, place_adapter
from ._convert import check_place, table, wanted
from ._merge import merge


def carry_out(
    adapter: str,
    out: Path,
    to: str,
    *,
    rank: int | None,
    energy: float | None,
    component: str | None,
    where: dict[str, Any],
    overwrite: bool,
) -> None:
    """Write an adapter as another engine loads it, and say how the engine is told of it.

    Raises:
        CallError: `out` is taken, there is no such engine, or both a rank and an energy are asked for.
        ConversionError: the engine has no place for something that the adapter holds.
    """
    if target_of(to).whole is not None:
        merge(adapter, out, **where, overwrite=overwrite)
        return
    check_place(out, overwrite or component is not None)
    share = wanted(rank, energy)
    console = Console(highlight=False)
    told = _exported(adapter, out, to, share, component, where, console)
    if told.layers:
        console.print(table(told.layers))
    console.print(f"{', '.join(p.name for p in told.files)} in {out}/: LoRA of rank {told.rank}", soft_wrap=True)
    console.print(f"use: {told.use}", soft_wrap=True)


def _exported(
    adapter: str, out: Path, to: str, rank: float | None, component: str | None, where: dict[str, Any], console: Console
) -> Exported:
    why = obstacle(PeftConfig.from_pretrained(adapter))
    if why is None and rank is None:
        settings = _settings(adapter, where) if target_of(to).asks_base else None
        return export(adapter, out, to, component=component, base=settings)
    opened = open_adapter(adapter, **where, report=console.print)
    if why is not None and rank is None:
        console.print(f"{why}: converted to LoRA, a share of {SHARE:g} of each layer's change", soft_wrap=True)
    return export(opened.model, out, to, adapter_name=opened.model.active_adapter, rank=rank, component=component)


def _settings(adapter: str, where: dict[str, Any]) -> dict[str, Any]:
    """The base's `config.json`: all of the base that is needed."""
    placed = place_adapter(adapter, where["base"], where["dtype"], where["device"])
    path = Path(placed.folder, "config.json")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(placed.folder).to_dict()
    except (OSError, ValueError) as error:
        raise CallError(f"the settings of the base {placed.name!r} cannot be read: {error}") from error
