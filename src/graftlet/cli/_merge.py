# SPDX-License-Identifier: Apache-2.0
"""`graftlet merge`."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from ..errors import CallError, UnsupportedOptionError
from ..model.base_files import fetched, skeleton_of
from ..model.shards import Merge
from ..train.adapter import Placed, open_adapter, place_adapter
from ..train.base import pick_device, pick_dtype
from ..train.callbacks import clock
from ..train.sources import whole_or_not_at_all


def merge(adapter: str, out: Path, *, base: str | None, dtype: str | None, device: str, overwrite: bool) -> None:
    """Write the merged model into `out`, whole or not at all: shard by shard, or from memory where that cannot be.

    Raises:
        CallError: `out` is taken.
        MergeError: the adapter cannot be merged, or the merged weights are not finite.
    """
    _check(out, overwrite)
    console, begun = Console(highlight=False), time.perf_counter()
    placed = place_adapter(adapter, base, dtype, device, console.print)
    wanted = pick_dtype(placed.table.dtype, pick_device(placed.table.device))
    try:
        work = _sharded(placed, adapter, out, wanted)
    except UnsupportedOptionError as why:
        console.print(f"the whole model is built: {why.args[0]}", soft_wrap=True)
        _from_memory(adapter, out, base, dtype, device)
    else:
        work.run(lambda text: console.print(text, soft_wrap=True), placed.tokenizer(adapter).save_pretrained)
    size = sum(p.stat().st_size for p in out.iterdir())
    console.print(f"merged {adapter} into {placed.name}", soft_wrap=True)
    told = str(wanted).removeprefix("torch.")
    console.print(f"{out}/: {size / 2**20:,.1f} MiB, {told}, {clock(time.perf_counter() - begun)}", soft_wrap=True)


def _sharded(placed: Placed, adapter: str, out: Path, dtype: torch.dtype) -> Merge:
    folder = Path(placed.folder)
    if not folder.is_dir():
        folder = fetched(placed.folder, placed.table.revision)
    skeleton = skeleton_of(folder, dtype, str(placed.config.task_type or "CAUSAL_LM"), placed.head)
    skeleton.config.use_cache = True
    out.parent.mkdir(parents=True, exist_ok=True)
    return Merge(folder, adapter, out, skeleton, device=str(pick_device(placed.table.device)))


def _from_memory(adapter: str, out: Path, base: str | None, dtype: str | None, device: str) -> None:
    opened = open_adapter(adapter, base=base, dtype=dtype, device=device)
    merged = opened.model.merge_and_unload(safe_merge=True, dequantize=True)

    def fill(folder: Path) -> None:
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        opened.encoder.tokenizer.save_pretrained(folder)

    whole_or_not_at_all(out, fill)


def _check(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise CallError(f"{out} is a file; a folder is needed for the merged model.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise CallError(f"{out} exists and is not empty; replace it with --overwrite, or choose another folder.")
    if not (out / "config.json").is_file():  # it is deleted whole: only a model may be
        raise CallError(f"{out} holds no model, so --overwrite does not delete it; choose another folder.")
