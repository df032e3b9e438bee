# SPDX-License-Identifier: Apache-2.0
"""Prefixes out of real caches: rows from what a text leaves in the cache, and prefixes put one behind the other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PromptLearningConfig
from ..core.host import check_known
from ..core.prompt import CACHES, ROWS, Cache
from ..errors import CallError, ConfigError, listing
from ..registry import lookup
from . import prefix, save

Kept = list[tuple[Tensor, Tensor] | None]
"""Each layer's keys and values `[1, heads, tokens, size]`; None for one that keeps none."""


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as the rows of a prefix, `[num_virtual_tokens, layers * 2 * heads * size]`.

    Layers that are narrower than the widest one are filled up with zeros. Raises `CallError` where the cache is empty, of
    several sequences, or too short.
    """
    layers = kept(past_key_values)
    keys = [pair[0] for pair in layers if pair]
    if not keys:
        raise CallError("past_key_values holds no keys and values; run a model on a text with use_cache=True.")
    heads, size = max(k.shape[1] for k in keys), max(k.shape[3] for k in keys)
    seen = max(prefix.length(past_key_values), *(k.shape[2] for k in keys))
    return packed(layers, num_virtual_tokens, seen, len(layers), heads, size)


def kept(cache: Any) -> Kept:
    """What a cache's layers keep, whichever kind of cache it is."""
    if (layers := getattr(cache, "layers", None)) is not None:
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    else:
        pairs = [(layer[0], layer[1]) for layer in cache]
    return [(k, v) if isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4 else None for k, v in pairs]


def packed(layers: Kept, tokens: int, seen: int, count: int, heads: int, size: int) -> Tensor:
    """The first `tokens` of the `seen` ones as rows for `count` layers of these heads and sizes."""
    first = next(pair[0] for pair in layers if pair)
    rows = first.new_zeros(tokens, 2 * count, heads, size)
    if seen < tokens:
        raise CallError(f"the cache holds {seen} tokens, {tokens} are needed: give a longer text or a shorter prefix.")
    for index, pair in enumerate(layers):
        for place, part in enumerate(pair or ()):
            _check(part, tokens, seen, heads, size)
            gone = seen - part.shape[2]  # a window has let go of what no later token looks at
            rows[gone:, 2 * index + place, : part.shape[1], : part.shape[3]] = part[0, :, : tokens - gone].transpose(
                0, 1
            )
    return rows.flatten(1)


def _check(part: Tensor, tokens: int, seen: int, heads: int, size: int) -> None:
    if part.shape[0] != 1:
        raise CallError(f"the cache is of {part.shape[0]} sequences; a prefix is made of one.")
    if part.shape[1] > heads or part.shape[3] > size:
        given = f"{part.shape[1]} heads of {part.shape[3]}"
        raise CallError(f"the cache has {given}, the prefix {heads} of {size}: they are of different models.")
    if part.shape[2] != seen != tokens:
        raise CallError(
            f"a layer with a window has {part.shape[2]} of {seen} tokens left, not the first {tokens}; make the cache of "
            f"the first {tokens} tokens alone."
        )


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a prefix (or cartridge) start from the first tokens of a cache; returns the rows it got.

    Raises `ConfigError` for an adapter of another kind, or with a network; `CallError` for a cache that does not fit.
    """
    name, config = _target(model, adapter_name, num_virtual_tokens)
    layers, heads = config.num_layers or 0, config.num_attention_heads or 1
    held, tokens = kept(past_key_values), config.num_virtual_tokens or 0
    seen = max([prefix.length(past_key_values), *(pair[0].shape[2] for pair in held if pair)])
    if not seen or len(held) > layers:
        raise CallError(f"the cache has {len(held)} layers and {seen} tokens; the prefix is of {layers} layers.")
    rows = packed(held, tokens, seen, layers, heads, (config.token_dim or 0) // heads)
    model.prompt_encoder[name].load_prompt_embeddings(rows)
    return rows


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix (or cartridge) start from what the base model caches of a text's first tokens; returns its rows.

    Args:
        use_chat_template: put the text into the tokenizer's chat template, as the system's words, where it has one.
        max_length: cut the text to as many tokens.

    Raises:
        ConfigError, CallError: as `initialize_kv_prefix_from_past_key_values`; or the text is too short.
    """
    name, config = _target(model, adapter_name, num_virtual_tokens)
    ids, tokens = text_ids(tokenizer, text, use_chat_template, max_length), config.num_virtual_tokens or 0
    if len(ids) < tokens:
        raise CallError(f"the text has {len(ids)} tokens, the prefix {tokens}: give a longer text or a shorter prefix.")
    given = torch.tensor([ids[:tokens]], device=model.word_embeddings.weight.device)  # those after change nothing
    base = model.get_base_model()
    with model.disable_adapter(), evaluating(base):
        output = base(input_ids=given, use_cache=True)
    cache = next(output[name] for name in CACHES if name in output)
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=name, past_key_values=cache)


def _target(model: Any, name: str | None, tokens: int | None) -> tuple[str, PromptLearningConfig]:
    """The adapter that is to start from a cache."""
    name = str(name or model.active_adapter)
    check_known([name], list(model.peft_config))
    config = model.peft_config[name]
    if not issubclass(lookup(config.peft_type).method, Cache):
        raise ConfigError(f"adapter {name!r} is {config.peft_type}, which does not live in the cache.")
    if config.num_transformer_submodules != 1:
        raise ConfigError(f"adapter {name!r} is for an encoder-decoder, whose layers share parts of the prefix.")
    if tokens not in (None, config.num_virtual_tokens):
        raise ConfigError(f"num_virtual_tokens={tokens}, but adapter {name!r} has {config.num_virtual_tokens}.")
    return name, config


def text_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> list[int]:
    """The text's tokens."""
    chat = getattr(tokenizer, "apply_chat_template", None)
    if use_chat_template and callable(chat):
        try:
            messages = [{"role": "system", "content": text}]
            ids: Any = chat(messages, tokenize=True, add_generation_prompt=False, return_dict=False)
            return torch.as_tensor(ids).flatten().tolist()[:max_length]
        except (TypeError, ValueError):
            pass  # it has no template
    return list(tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model without dropout and checkpointing, until the block ends."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


ALIKE = ("peft_type", "task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write an adapter whose cache holds those of saved ones, one behind the other.

    The first one's frozen tokens stay frozen. Raises `ConfigError` where there are less than two, where they do not live in
    the cache, or are made for different models.
    """
    if len(adapter_paths) < 2:
        raise ConfigError(f"{len(adapter_paths)} adapters to compose; two at least are needed.")
    configs = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    first = configs[0]
    for path, config in zip(adapter_paths, configs, strict=True):
        if not issubclass(lookup(config.peft_type).method, Cache):
            raise ConfigError(f"{path} is {config.peft_type}, which does not live in the cache.")
        for name in ALIKE:
            ours, theirs = getattr(first, name), getattr(config, name)
            if ours != theirs:
                raise ConfigError(f"{name} is {theirs} in {path}, but {ours} in {adapter_paths[0]}.")
    files = {str(path): save.load_peft_weights(path) for path in adapter_paths}
    for path, tensors in files.items():
        if more := sorted(tensors.keys() - {ROWS}):
            raise ConfigError(f"{path} holds {listing(more)} beside its cache, which cannot be composed.")
    rows = torch.cat([files[str(path)][ROWS] for path in adapter_paths])
    made = replace(first, num_virtual_tokens=len(rows))  # type: ignore[call-arg]
    save.save_adapter(Path(output_path), made, {ROWS: rows}, safe=safe_serialization)
