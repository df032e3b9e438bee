# SPDX-License-Identifier: Apache-2.0
"""The base's embeddings that go with an adapter: when they were targeted, or the vocabulary was resized.

They are the only weights of the base (besides biases that the config names) that an adapter's file may set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from ..config import PeftConfig
from ..core.host import bare
from ..core.layer import AdaptedLayer
from ..core.state import Slot
from ..errors import EmbeddingWarning, warn

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")


def to_save(model: nn.Module, config: PeftConfig | None, choice: bool | Literal["auto"]) -> dict[str, Tensor]:
    """The embeddings' weights to save, by key: of those targeted ("auto"), or of all after a resize."""
    if choice is False:
        return {}
    found = embedding_weights(model)
    if choice is True:
        if not found:
            warn(EmbeddingWarning, "save_embedding_layers=True, but the model has no embedding layers that it names.")
        return found
    if resized(model, config):
        warn(
            EmbeddingWarning,
            "the vocabulary was resized; the embedding layers are saved with the adapter.",
            stacklevel=5,
        )
        return found
    return {k: t for k, t in found.items() if k.endswith(".base_layer.weight")}


def embedding_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model's input and output embeddings, by their place in it; a tied one once."""
    found: dict[str, Tensor] = {}
    wanted = [m for m in (_ask(model, "get_input_embeddings"), _ask(model, "get_output_embeddings")) if m is not None]
    inner = {id(bare(m)) for m in wanted}
    wrapped = {id(h.base_layer) for h in model.modules() if isinstance(h, AdaptedLayer)}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if id(module) in inner else None
        if not isinstance(weight, Tensor):
            continue
        if any(t is weight for t in found.values()) and id(module) not in wrapped:
            continue
        found[f"{name}.weight"] = weight
    return found


def slots(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Where a file's embedding weights belong, of those it has."""
    return {key: Slot(tensor) for key, tensor in embedding_weights(model).items() if key in given}


def resized(model: nn.Module, config: PeftConfig | None) -> bool:
    """Whether the vocabulary differs from that of the base that the adapter names, as far as that can be read here."""
    name = config.base_model_name_or_path if config is not None else None
    own = getattr(getattr(model, "config", None), "vocab_size", None)
    if not name or own is None:
        return False
    from transformers import AutoConfig

    try:
        base = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return getattr(base, "vocab_size", own) != own


def vocabulary_hint(misshaped: list[str]) -> str:
    """What to do about an embedding of another size; empty where that is not the trouble."""
    rows = [re.search(r"\((\d+),", m) for m in misshaped if any(n in m for n in EMBEDDING_LAYER_NAMES)]
    found = next((r[1] for r in rows if r is not None), None)
    return f" Its vocabulary has {found} tokens: call model.resize_token_embeddings({found}) first." if found else ""


def without_levels(given: Mapping[str, Tensor], wanted: Mapping[str, Slot], adapter: str) -> dict[str, Tensor]:
    """Keys as they stand in a file, also from writers that left a compiled model's or the adapter's level in them."""
    clean = {key.replace("_orig_mod.", ""): tensor for key, tensor in given.items()}
    with_level = {_levelled(key, adapter): key for key in wanted}
    return {with_level.get(key, key) if key not in wanted else key: tensor for key, tensor in clean.items()}


def _levelled(key: str, adapter: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head}.{adapter}.{last}" if last in ("weight", "bias") else f"{key}.{adapter}"


def _ask(model: nn.Module, name: str) -> Any:
    getter = getattr(model, name, None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError, TypeError):
        return None
