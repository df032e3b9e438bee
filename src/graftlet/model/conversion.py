# SPDX-License-Identifier: Apache-2.0
"""transformers' own loading of adapters, `model.load_adapter`: how the keys of a file become those of the model.

transformers loads tensors by a list of rules, renamings and conversions. Those of the model are asked for; those of an
adapter's file come before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
    kept = [rule for rule in weight_conversions if isinstance(rule, WeightRenaming)]
    return [*rules, *kept, *_on_stacks(weight_conversions, adapter_name, peft_config)]


def _on_stacks(rules: Sequence[Any], adapter: str, config: PeftConfig | None) -> list[Any]:
    """For each rule that stacks the experts' weights: how their LoRA pairs become those of the stack."""
    from transformers.core_model_loading import WeightConverter

    names = set() if config is None or isinstance(config.target_modules, str) else set(config.target_modules or ())
    stacks = [r for r in rules if isinstance(r, WeightConverter) and fused.plainly_made(r)]
    given = [(r, parts) for r in stacks if (parts := [s for s in r.source_patterns if fused.part_of(s) in names])]
    made = []
    for depth, (rule, parts) in enumerate(reversed(given)):  # the last one is outermost
        place = rule.target_patterns[0].rpartition(".")[0]
        for factor in ("lora_A", "lora_B"):
            sources = [s.removesuffix(".weight") + f".{factor}.{adapter}.weight" for s in parts]
            target = f"{place}.{'base_layer.' * depth}{factor}.{adapter}.weight"
            every = [s.removesuffix(".weight") + f".{factor}.{adapter}.weight" for s in rule.source_patterns]
            made.append(WeightConverter(sources, target, [_stacking(every if factor == "lora_B" else [])]))
    return made


def _stacking(blocks: Sequence[str]) -> Any:
    """What makes a stack's factor of its experts': the parts of each below each other, or as these blocks."""
    from transformers.core_model_loading import ConversionOps

    class Stacking(ConversionOps):
        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
        ) -> dict[str, Any]:
            given = {s: input_dict[s] for s in source_patterns if s in input_dict}
            if not blocks:
                return {
                    target_patterns[0]: torch.cat([f for expert in zip(*given.values(), strict=True) for f in expert])
                }
            one = next(iter(given.values()))
            none = [torch.zeros(len(factor), 0, dtype=factor.dtype) for factor in one]  # a part without a pair
            experts = zip(*(given.get(s, none) for s in blocks), strict=True)
            return {target_patterns[0]: fused.stacked([torch.block_diag(*expert) for expert in experts])}

    return Stacking()


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
