# SPDX-License-Identifier: Apache-2.0
"""A model whose tokens are routed among saved LoRA adapters (Arrow)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..core import lifecycle
from ..core.host import hosts
from ..core.layer import AdaptedLayer
from ..core.tuner import Before
from ..errors import CallWarning, ConfigError, listing, warn
from ..methods.lora import LoRA, LoraConfig
from ..methods.variants.arrow import ArrowConfig
from ..weights.site import Linear
from .peft_model import PeftModel

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters as experts (`task_0`, `task_1`, ...) and route tokens among them (`arrow_router`, active).

    Args:
        task_specific_adapter_paths: directories, or repositories on the hub (`user/name`, or `user/name/folder`). All are
            plain LoRA of one rank on the same linear layers.
        arrow_config: how to route; the experts' names are written into it.
        general_adapter_paths: adapters whose mean is taken out of the experts (`gks_0`, ...), with `use_gks`.
        adapter_kwargs: go to `load_adapter`.

    Raises:
        ConfigError: no experts, or they differ. AdapterFileError: one cannot be loaded. The model is as it was.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("create_arrow_model needs task_specific_adapter_paths, at least one adapter.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("ArrowConfig.use_gks=True needs general_adapter_paths, whose mean is subtracted.")
    if general_adapter_paths and not arrow_config.use_gks:
        warn(CallWarning, "general_adapter_paths has no effect without ArrowConfig(use_gks=True).")
    tasks = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{i}": path for i, path in enumerate(general_adapter_paths or ()) if arrow_config.use_gks}
    before = Before(base_model)
    try:
        model = _loaded(base_model, {**tasks, **general}, adapter_kwargs)
        rank = _agreed(model, [*tasks, *general])
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(general)
        targets = model.peft_config["task_0"].target_modules
        model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=rank))
        model.set_adapter(ROUTER)
    except BaseException:
        lifecycle.unload(base_model)
        before.restore()
        raise
    return model


def _loaded(base: nn.Module, sources: dict[str, str], options: dict[str, Any]) -> PeftModel:
    """The base with all adapters on it."""
    (name, first), *rest = sources.items()
    path, given = _source(first, options)
    model = PeftModel.from_pretrained(base, path, name, **given)
    for name, source in rest:
        path, given = _source(source, options)
        model.load_adapter(path, name, **given)
    return model


def _source(path: str | os.PathLike[str], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where an adapter is: what comes after a repository's name is a folder in it."""
    parts = str(path).strip("/").split("/")
    if Path(path).exists() or Path(path).is_absolute() or len(parts) < 3:
        return str(path), options
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:]), **options}


def _agreed(model: nn.Module, names: list[str]) -> int:
    """The rank of all experts. Raises `ConfigError` unless all are plain LoRA on the same linear layers."""
    ranks: set[int] = set()
    for path, host in hosts(model):
        held = [n for n in names if n in host.adapters]
        if not isinstance(host, AdaptedLayer) or not isinstance(host.site, Linear):
            if held:
                raise ConfigError(f"Arrow routes on linear layers; {listing(held)} also adapts {path!r}.")
            continue
        if held and held != names:
            raise ConfigError(f"{path!r} is adapted by {listing(held)} alone; experts must be on the same layers.")
        if any(type(host.methods[n]) is not LoRA for n in held):
            raise ConfigError(f"the adapters on {path!r} are not all plain LoRA, which experts must be.")
        ranks |= {host.tensor(n, "lora_A.weight").shape[0] for n in held}
    if len(ranks) != 1:
        raise ConfigError(f"experts must have one rank on all layers; found: {listing(sorted(ranks))}.")
    return ranks.pop()
