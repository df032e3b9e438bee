# SPDX-License-Identifier: Apache-2.0
"""What stands before each row of a batch: the active adapter's prompt, or by `adapter_names` each row's own.

Prompts of several lengths end where the input begins. The places before the shorter ones are masked, and positions count
from each row's own beginning, so that a row's output is as if its adapter were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import PromptLearningConfig
from ..core.context import BASE, current
from ..core.prompt import Cache, Prompt
from ..errors import CallError


@dataclass(frozen=True)
class Part:
    """The rows that one adapter serves. index: where they are; None for all of them."""

    encoder: Prompt
    config: PromptLearningConfig
    index: Tensor | None

    @property
    def tokens(self) -> int:
        return self.config.num_virtual_tokens or 0


@dataclass(frozen=True)
class Lead:
    """A batch's prompts. Rows that no part has are the base's alone."""

    batch: int
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """The longest prompt's tokens."""
        return max(part.tokens for part in self.parts)

    @property
    def ragged(self) -> bool:
        """Whether prompts are of several lengths."""
        served = sum(self.batch if part.index is None else len(part.index) for part in self.parts)
        return served < self.batch or any(part.tokens != self.width for part in self.parts)

    def counts(self, device: torch.device) -> Tensor:
        """Each row's tokens, `[batch]`."""
        found = torch.zeros(self.batch, dtype=torch.long, device=device)
        for part in self.parts:
            found[slice(None) if part.index is None else part.index.to(device)] = part.tokens
        return found

    def taken(self, device: torch.device) -> Tensor:
        """Where there is a token, `[batch, width]`."""
        return torch.arange(self.width, device=device) >= self.width - self.counts(device)[:, None]

    def stacked(self, of: Callable[[Part], Tensor], empty: float = 0) -> Tensor:
        """What each part gives for its rows, `[rows, tokens, ...]`, as `[batch, width, ...]`."""
        if self.parts[0].index is None:
            return of(self.parts[0])
        given = [of(part) for part in self.parts]
        made = given[0].new_full((self.batch, self.width, *given[0].shape[2:]), empty)
        for part, rows in zip(self.parts, given, strict=True):
            assert part.index is not None
            made[part.index.to(made.device), self.width - part.tokens :] = rows.to(made)
        return made

    def rows(self, part: Part) -> int:
        """How many rows a part has."""
        return self.batch if part.index is None else len(part.index)

    def turned(self, x: Tensor) -> Tensor:
        """Rows that begin together in place of rows that end together: empty places go behind the input."""
        places = torch.arange(x.shape[1], device=x.device) + (self.width - self.counts(x.device))[:, None]
        return x[torch.arange(self.batch, device=x.device)[:, None], places % x.shape[1]]


def acting(model: Any) -> dict[str, Prompt]:
    """The encoders that serve this call, by adapter. Raises `CallError` where they cannot be mixed."""
    call = current()
    rows = model.active_adapters[:1] if call is None or call.rows is None else call.rows
    found = {name: model.prompt_encoder[name] for name in rows if name != BASE}
    kinds = {isinstance(encoder, Cache) for encoder in found.values()}
    if len(kinds) > 1:
        names = ", ".join(map(repr, found))
        raise CallError(f"of the adapters {names}, some go before the input and some into the cache; mix one kind.")
    return found


def lead_of(model: Any, batch: int, device: torch.device) -> Lead:
    """The prompts of a call with as many rows. Raises `CallError` where `adapter_names` are not for them."""
    call = current()
    if call is None or call.rows is None:
        return active_lead(model, batch)
    groups = call.groups(batch, device)
    if groups is None:
        raise CallError(f"adapter_names has {len(call.rows)} entries for a batch of {batch} rows; give one a row.")
    parts = [
        Part(model.prompt_encoder[name], model.peft_config[name], index if len(groups) > 1 else None)
        for name, index in groups
        if name != BASE
    ]
    return Lead(batch, tuple(parts))


def active_lead(model: Any, batch: int) -> Lead:
    """The active adapter's prompt before every row."""
    return Lead(batch, (Part(model.prompt_encoder[model.active_adapter], model.active_peft_config, None),))


def own_of(lead: Lead, part: Part, own: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments for prompts, those of a part's rows. Raises `CallError` where there is not one a row."""
    if part.index is None:
        return dict(own)
    for name, value in own.items():
        if isinstance(value, Tensor) and (not value.dim() or len(value) != lead.batch):
            raise CallError(f"{name} is {list(value.shape)} for a batch of {lead.batch} rows; give one a row.")
    return {n: v[part.index.to(v.device)] if isinstance(v, Tensor) else v for n, v in own.items()}
