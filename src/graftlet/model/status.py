# SPDX-License-Identifier: Apache-2.0
"""What a model with adapters is, layer by layer and in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..config import PeftConfig
from ..core.host import AdapterHost, hosts
from ..core.layer import AdaptedLayer
from ..core.lifecycle import roundings
from ..core.replace import ModulesToSaveWrapper
from ..core.tuner import BaseTuner
from ..errors import CallError
from ..weights.rounding import Rounding
from ..weights.storage import PLAIN
from .parts import configs_of, root_of


@dataclass
class TunerLayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """A whole model; a field is `"irregular"` where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def count(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` parameters; packed quantised ones count as what they stand for."""
    learn = total = 0
    for parameter in model.parameters():
        size = int(getattr(parameter, "ds_numel", 0)) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()
        total += size
        learn += size if parameter.requires_grad else 0
    return learn, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each layer that adapters are on.

    Raises `CallError` where the model has none.
    """
    base = getattr(root_of(model), "base_model", None)
    root = base if isinstance(base, BaseTuner) else _inner(model)
    found = [_layer(name, host) for name, host in hosts(root) if not isinstance(host, ModulesToSaveWrapper)]
    if not found:
        raise CallError(f"{type(model).__name__} has no adapters on its layers; there is no status to show.")
    return found


def _layer(name: str, host: AdapterHost) -> TunerLayerStatus:
    tensors = {n: list(host.state(n).values()) for n in host.adapters}
    learn = {n: [p.requires_grad for p in host.trainable(n).values()] for n in host.adapters}
    kind = type(host.get_base_layer()).__name__
    method = (
        next((type(m).__name__.lower() for m in host.methods.values()), "") if isinstance(host, AdaptedLayer) else ""
    )
    storage = host.site.storage if isinstance(host, AdaptedLayer) else PLAIN
    return TunerLayerStatus(
        name=name,
        module_type=f"{method}.{kind}" if method else kind,
        enabled=not host.disable_adapters,
        active_adapters=host.active_adapters,
        merged_adapters=list(host.merged_adapters),
        requires_grad={n: _same(flags, False) for n, flags in learn.items()},
        available_adapters=sorted(host.adapters),
        devices={n: sorted({t.device.type for t in ts}) for n, ts in tensors.items()},
        quantization_backend=None if storage.exact else storage.backend,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The layers' states as one."""
    root = _inner(model)
    layers = get_layer_status(model)
    names = sorted({n for layer in layers for n in layer.available_adapters})
    learn, total = count(model)
    configs = configs_of(model)
    return TunerModelStatus(
        base_model_type=type(root).__name__,
        adapter_model_type=_kind(configs),
        peft_types={n: str(c.peft_type) for n, c in configs.items()},
        trainable_params=learn,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same([x.enabled for x in layers], True),
        active_adapters=_same([x.active_adapters for x in layers], []),
        merged_adapters=_merged(layers),
        requires_grad={n: _same([x.requires_grad[n] for x in layers if n in x.requires_grad], False) for n in names},
        available_adapters=names,
        devices={n: sorted({d for x in layers for d in x.devices.get(n, [])}) for n in names},
        quantization_backend=_same([x.quantization_backend for x in layers], None),
    )


def _merged(layers: list[TunerLayerStatus]) -> Any:
    """The adapters that are merged wherever they are; `"irregular"` where one is merged in some of its layers only."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    left = {name for layer in layers for name in layer.available_adapters if name not in layer.merged_adapters}
    return "irregular" if merged & left else sorted(merged)


def _kind(configs: dict[str, PeftConfig]) -> str:
    """What the field calls the wrapper of a method: LoraModel for LoraConfig."""
    first = next(iter(configs.values()), None)
    return "None" if first is None else type(first).__name__.removesuffix("Config") + "Model"


def merge_errors(model: nn.Module) -> dict[str, Rounding]:
    """What rounding cost in each quantised layer that adapters are merged into, by the layer's path in the base model.

    It is empty where nothing is merged into a quantised layer. A model from `merge_and_unload` knows it too.
    """
    return roundings(_inner(model))


def _inner(model: nn.Module) -> nn.Module:
    model = root_of(model)
    getter: Any = getattr(model, "get_base_model", None)
    found: Any = getter() if callable(getter) else model
    return found


def _same(values: list[Any], default: Any) -> Any:
    """The value that all have, `"irregular"` where they differ."""
    if not values:
        return default
    return values[0] if all(v == values[0] for v in values) else "irregular"
