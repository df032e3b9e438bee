# SPDX-License-Identifier: Apache-2.0
"""An adapter that starts from data, in a recipe: the training data is what it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..config import PeftConfig
from ..methods.init import Start, initialiser
from ..methods.lora import LoraConfig
from ..model.mapping import get_peft_model
from ..weights.whole import is_writer
from .batches import Collate, Rows
from .callbacks import measuring

BATCHES = 64
"""How many batches a start looks at, at most."""
INITIAL = "initial"
"""The folder, in a run's, of an adapter before its training: it is needed to write it as plain LoRA."""


class Batches:
    """The first batches of the training data, in its order, on a device; they can be gone through again."""

    def __init__(self, rows: Rows, collate: Collate, size: int, device: Any) -> None:
        self.rows, self.collate, self.size, self.device = rows, collate, size, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(0, min(len(self.rows), BATCHES * self.size), self.size):
            batch = self.collate([self.rows[j] for j in range(i, min(i + self.size, len(self.rows)))])
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}


def start_of(config: PeftConfig) -> Start | None:
    """The start that a config asks for, where that is one from data."""
    start = initialiser(config.init_lora_weights) if isinstance(config, LoraConfig) else None
    return start if start is not None and (start.before or start.after) else None


def adapted(base: Any, config: PeftConfig, batches: Batches, output: Path, console: Console) -> Any:
    """The base with the recipe's adapter, started as its config says, from data where it says so; `console` is told."""
    start = start_of(config)
    with nullcontext(False) if start is None else measuring(console, start.name) as shown:
        if start is not None and start.before is not None:
            start.before(base, config, batches, shown)
        model: Any = get_peft_model(base, config)
        if start is not None and start.after is not None:
            start.after(model, model.active_adapter, batches, shown)
    if start is not None and start.rebases:
        model.save_pretrained(output / INITIAL, is_main_process=is_writer())
    return model


def initial_of(config: PeftConfig, output: Path) -> str | None:
    """Where the adapter before its training is, if it cannot be loaded again without its data."""
    start = start_of(config)
    return str(output / INITIAL) if start is not None and start.rebases else None
