# SPDX-License-Identifier: Apache-2.0
"""transformers' own loading of adapters, `model.load_adapter`: how the keys of a file become those of the model.

transformers loads tensors by a list of rules, renamings and conversions. Those of the model are asked for; those of an
adapter's file come before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from ..registry import entries, lookup
from . import fused

ROOT = "base_model.model."


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """The rules by which transformers puts an adapter's file into a model that has the adapter already.

    A file's keys begin with a level for the wrapper, and have none for the adapter. weight_conversions: the model's own
    rules; None or none of them: no rules. peft_config: the adapter's; without one, tensors of every method are known.
    """
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightRenaming

    known = entries() if peft_config is None else [lookup(peft_config.peft_type)]
    rules = [WeightRenaming(f"^{re.escape(ROOT)}", "")]
    for prefix in sorted({entry.prefix for entry in known}):
        rules.append(WeightRenaming(rf"\.({re.escape(prefix)}[^.]*)", rf".\1.{adapter_name}"))
    return [*rules, *(rule for rule in weight_conversions if isinstance(rule, WeightRenaming))]


def convert_peft_config_for_transformers(
    peft_config: PeftConfig, model: nn.Module, conversions: Sequence[Any] | None = None
) -> None:
    """Let a config that names single experts mean the stacks that the model has of them, in place.

    conversions: kept for callers of the reference; the model's own are asked for.
    """
    fused.retarget(model, peft_config)


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: PeftConfig, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """An adapter's tensors for the model as it is: pairs on single experts are put on the stacks, config included."""
    return fused.converted(model, peft_config, dict(adapter_state_dict), "the given dictionary")
