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
from ..core.host import bare, hosts
from ..core.layer import AdaptedLayer
from ..core.state import Slot
from ..core.target import vocabulary
from ..core.tuner import BaseTuner
from ..errors import EmbeddingMissingWarning, EmbeddingWarning, VocabularyWarning, warn

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")


def to_save(model: nn.Module, config: PeftConfig | None, choice: bool | Literal["auto"]) -> dict[str, Tensor]:
    """The embeddings' weights to save, by key: of those targeted ("auto"), or of all after a resize."""
    if choice is False:
        return {}
    found = embedding_weights(model)
    if choice is True and not found:
        why = "save_embedding_layers=True, but the model has no embedding layers that it names."
        warn(EmbeddingMissingWarning, why, 5)
    if choice is not True and found and resized(model, config):
        warn(EmbeddingWarning, "the vocabulary was resized; the embedding layers are saved with the adapter.", 5)
        choice = True
    targeted = _targeted(model, config)
    wanted = {**_once(found), **targeted} if choice is True else targeted
    return {key: targeted.get(key, found[key]) for key in wanted if key in found}


def embedding_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model's input and output embeddings, by their place in it."""
    wanted = [m for m in (_ask(model, "get_input_embeddings"), _ask(model, "get_output_embeddings")) if m is not None]
    inner = {id(bare(m)) for m in wanted}
    found = {f"{name}.weight": getattr(m, "weight", None) for name, m in model.named_modules() if id(m) in inner}
    return {key: weight for key, weight in found.items() if isinstance(weight, Tensor)}


def _once(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of those that share a weight, the first."""
    first: dict[int, str] = {}
    for key, weight in found.items():
        first.setdefault(id(weight), key)
    return {key: found[key] for key in first.values()}


def _targeted(model: nn.Module, config: PeftConfig | None) -> dict[str, Tensor]:
    """The weights of the embeddings that an adapter acts on as a whole, as they are without it."""
    found: dict[str, Tensor] = {}
    for path, host in hosts(model):
        if not isinstance(host, AdaptedLayer) or path.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            continue
        ours = [n for n, c in host.configs.items() if config is None or c is config]
        if any(host.methods[n].saves_embedding for n in ours):
            kept = host.site.kept(host.original()[0]) if host.merged else host.site.weight
            found[f"{path}.base_layer.weight"] = kept
    return found


def slots(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Where a file's embedding weights belong, of those it has. weights: the model's (`embedding_weights`)."""
    return {key: Slot(tensor) for key, tensor in weights.items() if key in given}


def resized(model: nn.Module, config: PeftConfig | None) -> bool:
    """Whether the vocabulary is another than when the adapter was made, or than that of the base that it names (as far
    as that can be read here)."""
    remembered = next((m.vocabulary for m in model.modules() if isinstance(m, BaseTuner)), None)
    if remembered is not None and remembered != vocabulary(model):
        return True
    name = config.base_model_name_or_path if config is not None else None
    own = getattr(getattr(model, "config", None), "vocab_size", None)
    if not name or own is None:
        return False
    from transformers import AutoConfig

    try:
        base = AutoConfig.from_pretrained(name, local_files_only=True)
    except Exception:  # whatever is wrong with the base's files is no reason not to save an adapter
        return False
    return getattr(base, "vocab_size", own) != own


def check_vocabulary(model: nn.Module, recorded: str | None, given: Mapping[str, Tensor], origin: str) -> None:
    """Warn where an adapter was trained on another vocabulary, and has no tensor of that size, which would not fit."""
    own = vocabulary(model)
    if recorded is None or own is None or recorded == str(own):
        return
    if any(recorded == str(size) for tensor in given.values() for size in tensor.shape):
        return
    warn(
        VocabularyWarning,
        f"{origin} was trained on a vocabulary of {recorded} tokens, the model has {own}. Where tokens were added, "
        f"call model.resize_token_embeddings({recorded}) and give them the embeddings that they had.",
        stacklevel=4,
    )


def vocabulary_hint(misshaped: list[str]) -> str:
    """What to do about an embedding of another size; empty where that is not the trouble."""
    rows = [re.search(r"\((\d+),", m) for m in misshaped if any(n in m for n in EMBEDDING_LAYER_NAMES)]
    found = next((r[1] for r in rows if r is not None), None)
    return f" Its vocabulary has {found} tokens: call model.resize_token_embeddings({found}) first." if found else ""


def without_levels(given: Mapping[str, Tensor], wanted: Mapping[str, Slot], adapter: str) -> dict[str, Tensor]:
    """Keys as they stand in a file, also from writers that left a compiled model's or the adapter's level in them."""
    clean = {key.replace("_orig_mod.", ""): tensor for key, tensor in given.items()}
    clean = {key: tensor for key, tensor in clean.items() if _again(key, adapter) not in clean or key in wanted}
    with_level = {_levelled(key, adapter): key for key in wanted}
    return {with_level.get(key, key) if key not in wanted else key: tensor for key, tensor in clean.items()}


def _again(key: str, adapter: str) -> str | None:
    """The key whose tensor stands under this one as well: so the reference writes copies of modules whose biases are
    trained, or whose vocabulary was resized."""
    for level in (f".modules_to_save.{adapter}.", ".modules_to_save.", ".original_module."):
        if level in key:
            return key.replace(level, ".")
    return None


def _levelled(key: str, adapter: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head}.{adapter}.{last}" if last in ("weight", "bias") else f"{key}.{adapter}"


def _ask(model: nn.Module, name: str) -> Any:
    getter = getattr(model, name, None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError, TypeError):
        return None
