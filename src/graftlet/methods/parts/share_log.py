# SPDX-License-Identifier: Apache-2.0
"""What a classifier of experts gave, call by call, to be looked at from the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...core.method import View

LOG = (
    "get_latest_scalings", "get_scalings_log", "enable_scalings_logging", "disable_scalings_logging", "clear_scalings_log",
    "get_bucketed_scalings_log",
)  # fmt: skip
"""The functions of `Logged`."""


@dataclass
class Journal:
    """What the classifier gave: the latest shares, and all of them while `on`."""

    latest: Tensor | None = None
    on: bool = False
    kept: list[Tensor] = field(default_factory=list)


class Logged:
    """What a method whose views hold a `journal` gives the model."""

    def get_latest_scalings(self, p: View) -> Tensor | None:
        """The last call's shares, `[rows, tokens, layers, experts]`; None before the first."""
        return p.journal.latest

    def get_scalings_log(self, p: View) -> list[Tensor]:
        """The shares of all calls while logging was on, in a new list."""
        return list(p.journal.kept)

    def enable_scalings_logging(self, p: View) -> None:
        """Keep every call's shares from now on."""
        p.journal.on = True

    def disable_scalings_logging(self, p: View) -> None:
        """Keep no more; what was kept stays."""
        p.journal.on = False

    def clear_scalings_log(self, p: View) -> None:
        """Forget the shares that were kept."""
        p.journal.kept.clear()

    def get_bucketed_scalings_log(self, p: View) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The kept shares by their number of tokens: their places in the log, and they."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, shares in enumerate(p.journal.kept):
            numbers, kept = found.setdefault(shares.shape[1], ([], []))
            numbers.append(i)
            kept.append(shares)
        return found
