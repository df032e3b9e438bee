# SPDX-License-Identifier: Apache-2.0
"""What is done to adapters of a model that is no `PeftModel`: other libraries' own ways to adapters call these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import lifecycle
from ..core.host import AdapterHost, check_known, commons, hosts
from ..core.target import in_layers, matches, resolve, walk
from ..core.tuner import BaseTuner
from ..errors import MergeWarning, listing, warn
from ..registry import lookup


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: type | None = None
) -> None:
    """Make an adapter, or several together, the active ones.

    layer_cls: kept for callers of the reference; every wrapper of the model follows.
    """
    lifecycle.set_adapter(model, adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type | None = None
) -> list[str] | None:
    """Forget an adapter on every layer. Returns what is active then; None where nothing is.

    prefix, layer_cls: kept for callers of the reference; the layers know their own tensors.
    """
    return lifecycle.delete_adapter(model, adapter_name) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters learn, or freeze them, whether they are active or not."""
    lifecycle.set_requires_grad(model, adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep an adapter's half-precision tensors in float32 from now on."""
    held = [p for _, h in hosts(model) if adapter_name in h.adapters for p in h.parameters_of(adapter_name)]
    held += [p for _, box in commons(model) if adapter_name in box for p in box.parameters()]
    for parameter in held if autocast_adapter_dtype else ():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Let a layer that accelerate keeps elsewhere have its weights until the block ends."""
    held = [m for m in layer.modules() if callable(getattr(m.__dict__.get("_hf_hook"), "pre_forward", None))]
    hooks: list[tuple[nn.Module, Any]] = [(m, m.__dict__["_hf_hook"]) for m in held]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, torch.empty(0))


def check_adapters_to_merge(module: AdapterHost, adapter_names: list[str] | None = None) -> list[str]:
    """Of the adapters asked for (the active ones unless named), those that a layer holds and that are not merged yet."""
    names = module.active_adapters if adapter_names is None else adapter_names
    if done := [name for name in names if name in module.merged_adapters]:
        warn(MergeWarning, f"{listing(done)} merged already.")
    return module.to_merge(names)


class _ExcludedModule:
    """That a module would be targeted, but is among `exclude_modules`."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: PeftConfig, key: str) -> bool | _ExcludedModule:
    """Whether a config's `target_modules` means the module at a path; an excluded one is falsy, of a type of its own."""
    if matches(key, config.exclude_modules):
        return _ExcludedModule()
    return matches(key, config.target_modules) and in_layers(key, config)


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The paths of a model that an adapter's config means (`matched`), and those that it does not (`unmatched`)."""
    check_known([adapter_name], list(tuner.peft_config))
    config = tuner.peft_config[adapter_name]
    paths = {p.path: bool(check_target_module_exists(config, p.path)) for p in walk(tuner.model)}
    return {
        "matched": [path for path, meant in paths.items() if meant],
        "unmatched": [path for path, meant in paths.items() if not meant],
    }


def maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The config itself, with `target_modules="all-linear"` written out for a model."""
    if peft_config.target_modules is not None:
        peft_config.target_modules = resolve(peft_config, lookup(peft_config.peft_type), model)
    return peft_config


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module. share_weights: of the same parameters and buffers."""
    import copy

    kept: list[Tensor] = [*module.parameters(), *module.buffers()] if share_weights else []
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})
