# SPDX-License-Identifier: Apache-2.0
"""`graftlet merge`."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ..errors import CallError
from ..train.adapter import open_adapter
from ..train.callbacks import clock
from ..train.sources import whole_or_not_at_all


def merge(adapter: str, out: Path, *, base: str | None, dtype: str | None, device: str, overwrite: bool) -> None:
    """Write the merged model into `out`, whole or not at all.

    Raises:
        CallError: `out` is taken.
        MergeError: the adapter cannot be merged, or the merged weights are not finite.
    """
    _check(out, overwrite)
    console, begun = Console(highlight=False), time.perf_counter()
    opened = open_adapter(adapter, base=base, dtype=dtype, device=device, report=console.print)
    tokenizer = opened.encoder.tokenizer
    merged = opened.model.merge_and_unload(safe_merge=True, progressbar=False)

    def fill(folder: Path) -> None:
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    whole_or_not_at_all(out, fill)
    size = sum(p.stat().st_size for p in out.iterdir())
    dtype_told = str(merged.dtype).removeprefix("torch.")
    console.print(f"merged {adapter} into {opened.base}", soft_wrap=True)
    console.print(
        f"{out}/: {size / 2**20:,.1f} MiB, {dtype_told}, {clock(time.perf_counter() - begun)}", soft_wrap=True
    )


def _check(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise CallError(f"{out} is a file; a folder is needed for the merged model.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise CallError(f"{out} exists and is not empty; replace it with --overwrite, or choose another folder.")
    if not (out / "config.json").is_file():  # it is deleted whole: only a model may be
        raise CallError(f"{out} holds no model, so --overwrite does not delete it; choose another folder.")
