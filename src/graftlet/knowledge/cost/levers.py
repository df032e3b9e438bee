# SPDX-License-Identifier: Apache-2.0
"""What would make a step smaller, each tried by taking that step instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .setup import Setup


@dataclass(frozen=True)
class Change:
    """One thing to do otherwise. said: what to write, in a call and in a recipe. changes: of the setup."""

    name: str
    said: str
    changes: dict[str, Any]
    costs: str = ""


def changes_of(setup: Setup) -> Iterator[Change]:
    """The levers that this setup has, those first that change nothing of what is computed."""
    if setup.device.kind in ("cuda", "cpu") and not setup.optimised:
        yield Change("optimised", "graftlet.optimize_model(model)", {"optimised": True})
    if not setup.checkpointing:
        yield Change(
            "checkpointing",
            "training.gradient_checkpointing = true",
            {"checkpointing": True},
            "every block's forward is run twice",
        )
    if setup.adapter is not None and setup.quantisation is None:
        yield Change(
            "4 bits",
            'quantization.method = "nf4"',
            {"quantisation": "nf4", "prepared": False},
            "the base is rounded, and its weights are read anew for each product",
        )
    yield from _smaller(setup)


def _smaller(setup: Setup) -> Iterator[Change]:
    if setup.batch > 1:
        half, times = setup.batch // 2, setup.accumulation * -(-setup.batch // (setup.batch // 2))
        yield Change(
            "batch",
            f"training.batch_size = {half}, training.accumulation = {times}",
            {"batch": half, "accumulation": times},
            "smaller products",
        )
    if setup.sequence > 128:
        short = setup.sequence // 2
        yield Change("sequence", f"data.max_length = {short}", {"sequence": short}, "longer examples are left out")
    rank = getattr(setup.adapter, "r", None)
    if isinstance(rank, int) and rank > 1:
        yield Change("rank", f"adapter.r = {rank // 2}", {"adapter": {"r": rank // 2}}, "a smaller adapter")
