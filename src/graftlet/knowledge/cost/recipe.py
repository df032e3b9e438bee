# SPDX-License-Identifier: Apache-2.0
"""A training recipe's cost: what its keys mean for `estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...config import PeftConfig
from ...errors import ConfigError, DependencyError
from ...train.base import pick_dtype
from ...train.optimisers import NAMES
from ...train.prepare import adapter_config
from ...train.recipe import Recipe
from ...train.sources import PACKAGE, cache_folder, package_files, packed_folder
from .devices import Device, find_device
from .estimating import Estimate, estimated
from .setup import Setup, model_config

OPTIMISERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw_fused",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
    **{name: name for name in NAMES},
}
"""transformers' names for what is known here."""


def estimate_recipe(recipe: Recipe, device: str | Device | None = None) -> Estimate:
    """What a step of a recipe takes, its rows as long as `data.max_length`. Neither weights nor data are read.

    device: another than the recipe's, such as "H100".

    Raises `ConfigError` for what cannot be estimated, with file and line.
    """
    return estimated(_setup(recipe, adapter_config(recipe), device))


def _setup(recipe: Recipe, config: PeftConfig, device: str | Device | None) -> Setup:
    training, packed = recipe.training, recipe.quantization
    if training.mixed_precision != "no":
        raise ConfigError(
            f"{recipe.place('training', 'mixed_precision')} = {training.mixed_precision!r}: a step under autocast cannot be "
            'foretold; load the model itself in half precision: model.dtype = "bfloat16".'
        )
    found = find_device(device if device is not None else recipe.model.device)
    return Setup(
        config=model_config(_source(recipe)),
        adapter=config,
        device=found,
        batch=training.batch_size,
        sequence=recipe.data.max_length,
        accumulation=training.accumulation,
        optimiser=_optimiser(recipe),
        optimiser_options=training.optimizer_options,
        dtype=_dtype(recipe, found),
        checkpointing=training.gradient_checkpointing,
        quantisation=None if packed is None else packed.method,
        double=packed is None or packed.double,
        skip=() if packed is None else tuple(packed.skip),
        padding=not training.packing and training.batch_size > 1,
        attention=recipe.model.attention,
    )


def _dtype(recipe: Recipe, device: Device) -> torch.dtype:
    if recipe.model.dtype != "auto" or device.here:
        return pick_dtype(recipe.model.dtype, torch.device(device.kind))
    return torch.bfloat16


def _optimiser(recipe: Recipe) -> str:
    name = recipe.training.optimizer
    if name not in OPTIMISERS:
        place = recipe.place("training", "optimizer")
        raise ConfigError(
            f"{place} = {name!r}: what it keeps is known of {', '.join(OPTIMISERS)}; it cannot be foretold."
        )
    return OPTIMISERS[name]


def _source(recipe: Recipe) -> Any:
    """Where the config of the base is: of a package, in its GGUF file's head, or beside what that was converted to."""
    source = recipe.model.source
    if not source.startswith(PACKAGE):
        path = Path(source).expanduser()
        return path if path.exists() else source
    if (folder := packed_folder(source)) is not None:
        return Path(folder)
    file, *more = package_files(source, "*.gguf")
    if more:
        raise ConfigError(
            f"{recipe.place('model', 'source')} = {source!r}: the package has several GGUF files; name one."
        )
    done = sorted((cache_folder() / "models").glob(f"{file.stem}-*/config.json"))
    if done:
        return done[0].parent
    try:
        import gguf  # noqa: F401 - transformers reads the format through it
    except ImportError:
        raise DependencyError("reading a GGUF file needs the package 'gguf': pip install gguf") from None
    return file
