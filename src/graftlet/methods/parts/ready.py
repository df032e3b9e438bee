# SPDX-License-Identifier: Apache-2.0
"""A decoder that was trained elsewhere: with its weights, or the shape of it for an adapter's file to fill."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn

from ... import limits
from ...core.target import HEADS
from ...errors import AdapterFileError, ConfigError
from ...files import find_file, read_tensors
from .heads import head_name

PROJECTED = "causal_lm_with_hidden_projection"
"""The `model_type` of a checkpoint that holds a decoder and a projection of its states to a larger model's width."""

WITHIN, PROJECTION = "shadow_model.", "shadow_hidden_projection.weight"
LABELS = ("id2label", "label2id", "pad_token_id")


def ready(source: str, width: int, weights: bool) -> tuple[Any, nn.Linear | None]:
    """The decoder of a checkpoint, its embeddings frozen, and the projection `[width, its own]` where the checkpoint has one.

    source: a directory or a repository of a transformers model; no code of its own is run. weights: read them; otherwise only
    its `config.json` is read.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit a model of this width.
    """
    try:
        settings = json.loads(find_file(source, "config.json").read_text())
        if settings.get("model_type") == PROJECTED:
            decoder, projection = _projected(source, settings["shadow_model_config"], width, weights)
        else:
            decoder, projection = _plain(source, weights), None
    except (AdapterFileError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"shadow_model={source!r} gives no decoder: {error}") from error
    decoder.get_input_embeddings().requires_grad_(False)
    return decoder, projection


def _plain(source: str, weights: bool) -> Any:
    from transformers import AutoConfig, AutoModel

    if weights:
        return AutoModel.from_pretrained(source, trust_remote_code=False)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return AutoModel.from_config(bounded(config), trust_remote_code=False)


def _projected(source: str, settings: dict[str, Any], width: int, weights: bool) -> tuple[Any, nn.Linear]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**settings)
    decoder: Any = AutoModel.from_config(bounded(config))
    projection = nn.Linear(config.hidden_size, width, bias=False)
    if weights:
        held = read_tensors(find_file(source, "model.safetensors"))
        decoder.load_state_dict({n.removeprefix(WITHIN): t for n, t in held.items() if n.startswith(WITHIN)})
        if PROJECTION not in held or held[PROJECTION].shape != projection.weight.shape:
            shape = tuple(held[PROJECTION].shape) if PROJECTION in held else "missing"
            raise ConfigError(f"its {PROJECTION} is {shape}; {tuple(projection.weight.shape)} is needed.")
        with torch.no_grad():
            projection.weight.copy_(held[PROJECTION])
    return decoder, projection


def bounded(config: Any) -> Any:
    """A decoder's config. Raises `ConfigError` for more blocks than anyone means: only to make them takes long."""
    if (depth := getattr(config, "num_hidden_layers", 0)) > limits.MAX_BLOCKS:
        raise ConfigError(f"a decoder of {depth:,} blocks; if they are meant, raise graftlet.limits.MAX_BLOCKS.")
    return config


def relative(model: nn.Module, decoder: Any) -> Any:
    """A model of a decoder's own family, with a head as another model has it: a classifier's, or one for tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config, classifies = copy.deepcopy(decoder.config), head_name(model) in HEADS
    for name in LABELS if classifies else ():
        setattr(config, name, getattr(model.config, name))
    return (AutoModelForSequenceClassification if classifies else AutoModelForCausalLM).from_config(config)
