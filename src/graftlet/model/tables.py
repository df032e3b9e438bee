# SPDX-License-Identifier: Apache-2.0
"""The registry under the reference's names: tables by `PeftType`, and a tuner class a method (`LoraModel`, ...).

The tables are made when they are first asked for; methods that are registered later are found by `graftlet.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..core.method import Method
from ..core.tuner import BaseTuner
from ..errors import ConfigError
from ..registry import Entry, entries
from .mapping import target_keys


class NamedTuner(BaseTuner):
    """A `BaseTuner` for adapters of one method: `LoraModel(model, config, "default")`. Other ones raise `ConfigError`.

    state_dict: adapt just the layers that have tensors here, whatever `target_modules` says.
    """

    entry: Entry

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        for config in peft_config.values() if isinstance(peft_config, dict) else [peft_config]:
            if not isinstance(config, self.entry.config):
                raise ConfigError(
                    f"{type(self).__name__} takes a {self.entry.config.__name__}; {type(config).__name__} was given."
                )
            if state_dict is not None:
                target_keys(config, model, state_dict)
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage)


def _named(entry: Entry) -> type[NamedTuner]:
    name = entry.config.__name__.removesuffix("Config") + "Model"
    facts = {"entry": entry, "__module__": __name__, "__doc__": f"{entry.summary}\n\nAs `NamedTuner`."}
    return type(name, (NamedTuner,), facts)


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """A prefix in the layout of old Bloom caches: a layer's keys `[batch x heads, dim, tokens]` and values
    `[batch x heads, tokens, dim]`, from parts that together are `[2 x layers, batch, heads, tokens, dim]`."""
    keys, values = torch.cat(past_key_values).flatten(1, 2).chunk(2)
    return tuple(zip(keys.transpose(-1, -2), values, strict=True))


def _made() -> dict[str, Any]:
    tuners, own = {}, {}
    for entry in entries():
        if not entry.config.is_prompt_learning:
            own[entry.name] = _named(entry)
        tuners[entry.name] = own.get(entry.name, entry.method)
    known = [e for e in entries() if e.name in PeftType.__members__]
    layered = [e.name for e in known if issubclass(e.method, Method)]
    return {
        "PEFT_TYPE_TO_CONFIG_MAPPING": {PeftType(e.name): e.config for e in known},
        "PEFT_TYPE_TO_TUNER_MAPPING": {PeftType(e.name): tuners[e.name] for e in known},
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": {PeftType(name): tuners[name] for name in layered},
        "PEFT_TYPE_TO_PREFIX_MAPPING": {PeftType(e.name): e.prefix for e in known},
        "COMPATIBLE_TUNER_TYPES": tuple(PeftType(name) for name in layered),
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": {},  # current caches have one layout for all models
        **{tuner.__name__: tuner for tuner in own.values()},
    }


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    globals().update({k: v for k, v in _made().items() if k not in globals()})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
