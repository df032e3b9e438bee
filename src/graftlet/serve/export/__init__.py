# SPDX-License-Identifier: Apache-2.0
"""An adapter as another engine loads it: plain LoRA with its scaling in B, named and laid out as the engine has it.

One file an engine; `TARGETS` lists them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import CallError, nearest
from .plain import from_folder, from_model, uniform
from .target import Exported, Options, Target, known

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

TARGETS: Mapping[str, Target] = known
"""The engines, by the name that `export` is given."""


def target_of(name: str) -> Target:
    """The engine of a name. Raises `CallError` for one that there is none of."""
    if name not in TARGETS:
        raise CallError(f"there is no export to {name!r}{nearest(name, TARGETS)} Known: {', '.join(TARGETS)}.")
    return TARGETS[name]


def export(
    source: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    adapter_name: str = "default",
    rank: float | None = None,
    component: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Exported:
    """Write an adapter into the folder `out` as another engine loads it.

    Args:
        source: a model with the adapter; or, where it is plain LoRA, its folder or hub id: the base is then not needed.
        to: vllm, gguf-lora, diffusers, mlx or merged.
        rank: convert the adapter to LoRA of this rank, or to this share of each layer's change (`convert_to_lora`). None
            takes LoRA as it is, and of other methods a share of 0.99.
        component: diffusers alone: unet, transformer, text_encoder, text_encoder_2 or text_encoder_3.
        base: gguf-lora alone: the base's `config.json` as a dictionary, where a model in memory cannot tell it.

    Raises:
        CallError: there is no such engine, or it needs to be told more.
        ConversionError: the engine has no place for something that the adapter holds. Nothing was written.
        AdapterFileError: `source` is no adapter, or is damaged.
    """
    target, folder = target_of(to), Path(out)
    if folder.is_file():
        raise CallError(f"{folder} is a file; a folder is needed to export an adapter into.")
    if target.whole is not None:
        if not isinstance(source, nn.Module):
            raise CallError(f"export to {to!r} needs the model: load the adapter on its base first.")
        return target.whole(source, adapter_name, folder)
    if isinstance(source, nn.Module):
        plain = from_model(source, adapter_name, rank, target.name)
        base = base or _settings(source)
    else:
        plain = from_folder(source)
        if rank is not None:
            raise CallError("a conversion to another rank needs the model: load the adapter on its base first.")
    plain = uniform(plain)
    target.check(plain)
    assert target.write is not None
    return target.write(plain, folder, Options(component, base))


def _settings(model: nn.Module) -> dict[str, Any] | None:
    to_dict: Any = getattr(getattr(model, "config", None), "to_dict", None)
    return to_dict() if callable(to_dict) else None  # pyright: ignore[reportReturnType]
