# SPDX-License-Identifier: Apache-2.0
"""What an engine takes, and the table of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ConversionError, listing
from ..convert import Fit
from .plain import Plain


@dataclass(frozen=True)
class Options:
    """What an engine may have to be told. component: the part of a pipeline. base: the base model's settings."""

    component: str | None = None
    base: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Exported:
    """What was written. rank: of every layer, 0 where it is no LoRA. use: how the engine is told of it.

    layers: how the layers came out that had to be converted to LoRA, by path; empty where nothing was lost.
    """

    files: list[Path]
    use: str
    rank: int = 0
    layers: dict[str, Fit] = field(default_factory=dict)


Write = Callable[[Plain, Path, Options], Exported]
Whole = Callable[[nn.Module, str, Path], Exported]
"""(model, adapter, folder): an export of the whole model."""


@dataclass(frozen=True)
class Target:
    """One engine.

    whole: it takes the whole model. asks_base: it must be told the base's settings (`Options.base`).
    embeddings, kernels, biases: it loads LoRA on embeddings, on convolutions, and on biases (`lora_bias`).
    """

    name: str
    summary: str
    write: Write | None = None
    embeddings: bool = True
    kernels: bool = False
    biases: bool = False
    whole: Whole | None = None
    asks_base: bool = False

    def check(self, plain: Plain) -> None:
        """Raise `ConversionError` where the engine has no place for something that the adapter holds."""
        if plain.others:
            raise ConversionError(
                f"{self.name} loads LoRA alone, and the adapter also holds {listing(plain.others, 4)} (of modules_to_save, "
                f"trainable_token_indices or bias), which would be lost. {MERGE}"
            )
        for has, allowed, what in (
            ([k for k, p in plain.layers.items() if p.embedding], self.embeddings, "on embeddings"),
            ([k for k, p in plain.layers.items() if p.A.dim() > 2], self.kernels, "on convolutions"),
            ([k for k, p in plain.layers.items() if p.bias is not None], self.biases, "with biases (lora_bias)"),
        ):
            if has and not allowed:
                raise ConversionError(f"{self.name} loads no LoRA {what}, as on {listing(has, 3)}. {MERGE}")


MERGE = "Export the whole model instead: to='merged' (--to merged)."

known: dict[str, Target] = {}


def target(name: str, **facts: Any) -> Callable[[Write], Write]:
    """Register the decorated function as what writes for the engine `name`; its docstring's first line says what."""

    def register(write: Write) -> Write:
        known[name] = Target(name, (write.__doc__ or name).strip().splitlines()[0], write, **facts)
        return write

    return register
