# SPDX-License-Identifier: Apache-2.0
"""An adapter that took a part of the base's weights into itself, written as a LoRA adapter for the untouched base.

It started at s B0 A0, and the base kept W - s B0 A0. So what it changes of W is s (B A - B0 A0), which is a pair of twice
the rank: A' = [A; A0], B' = [B, -B0], at the same scaling.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import PeftConfig
from ..errors import AdapterFileError, ConfigError, ConversionWarning, listing, warn
from ..methods.init import initialiser
from ..methods.lora import LoraConfig
from .save import load_peft_weights

A_KEYS, B_KEYS = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


def as_plain(
    config: PeftConfig, tensors: Mapping[str, Tensor], initial: str | os.PathLike[str]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the file's tensors of the plain LoRA adapter.

    initial: the folder to which the same adapter was saved before its training.

    Raises:
        ConfigError: the adapter is no LoRA, or a variant whose start is not in its factors.
        AdapterFileError: the folder's adapter has other layers or shapes.
    """
    if not isinstance(config, LoraConfig) or config.kasa_config is not None:
        raise ConfigError(f"path_initial_model_for_weight_conversion is for LoRA's own starts, not {config.peft_type}.")
    start = initialiser(config.init_lora_weights)
    if not start.rebases and start.name != "True":
        warn(ConversionWarning, f"init_lora_weights={start.name!r} leaves the base as it is; nothing to convert.", 5)
    before = load_peft_weights(initial)
    pairs = [k for k in tensors if k.endswith((*A_KEYS, *B_KEYS))]
    wrong = [k for k in pairs if k not in before or before[k].shape != tensors[k].shape]
    if wrong or not pairs:
        raise AdapterFileError(
            f"{initial} is not this adapter before its training: {listing(wrong, 3) or 'no factors'}."
        )
    layers = {k.removesuffix(end) for k in pairs for end in A_KEYS if k.endswith(end)}
    made = {
        k: t for k, t in tensors.items() if k.removesuffix("base_layer.weight") not in layers
    }  # what the start left
    for key in pairs:
        first = before[key].to(tensors[key])
        made[key] = (
            torch.cat([tensors[key], first], 0) if key.endswith(A_KEYS) else torch.cat([tensors[key], -first], 1)
        )
    return _doubled(config), made


def _doubled(config: LoraConfig) -> LoraConfig:
    """The config at twice the rank, the scaling as it was."""
    made = copy.deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2
    made.init_lora_weights = True
    made.corda_config = made.lora_ga_config = made.eva_config = None
    made.r, made.lora_alpha = config.r * 2, config.lora_alpha * factor
    made.rank_pattern = {k: v * 2 for k, v in (config.rank_pattern or {}).items()}
    made.alpha_pattern = {k: v * factor for k, v in (config.alpha_pattern or {}).items()}
    return made
