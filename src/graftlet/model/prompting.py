# SPDX-License-Identifier: Apache-2.0
"""Prompt methods beside a model: their encoders, their state, their files. What they put into a call is in `prompted`.

In memory the encoders stand in `model.prompt_encoder`, and the base's input embedding once more in
`model.word_embeddings`; in a file there are the prompt's rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import limits
from ..config import PeftConfig, PromptLearningConfig, TaskType
from ..core import lifecycle, state
from ..core.host import hosts
from ..core.planning import plan_saved
from ..core.prompt import CACHES, Cache, Prompt
from ..core.tensors import Box, renamed
from ..errors import AdapterFileError, ConfigError
from ..registry import lookup
from ..weights.whole import gathered, made_alike, shape_of
from . import prefix, prompted
from .parts import transformers_config

QUERIES = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")


def attach(model: Any, name: str, config: PeftConfig, loading: bool = False) -> None:
    """Make an adapter's encoder (and its copies of `modules_to_save`) beside a model.

    loading: the rows come from a file. Raises `ConfigError` where the model does not say its sizes, or has no cache.
    """
    assert isinstance(config, PromptLearningConfig)
    base, kind = model.base_model, lookup(config.peft_type).method
    words = _words(base)
    fill(config, base, words, issubclass(kind, Cache))
    if loading:
        _check_size(config, base)
    with gathered(words):
        encoder: Prompt = kind(config, words, loading)
    encoder.to(words.weight.device)
    made_alike([*encoder.parameters(), *encoder.buffers()], base)
    if config.modules_to_save:
        plan_saved(base, config, name).build(meta=loading).apply()
    if "prompt_encoder" not in model._modules:
        model.prompt_encoder = Box()
        model.word_embeddings = words
        model._base_takes = prompted.parameters(base)
    model.prompt_encoder.put(name, encoder)
    model._prompt_configs[name] = config
    if len(model._prompt_configs) == 1:
        for parameter in base.parameters():
            parameter.requires_grad = False
        activate(model, name, config.inference_mode)
    else:
        activate(model, model.active_adapter, model.active_peft_config.inference_mode)


def _check_size(config: PromptLearningConfig, base: nn.Module) -> None:
    """Raise `ConfigError` where a saved prompt's config asks for absurdly more numbers than its base has."""
    sizes = [
        getattr(config, n, None) or 1 for n in ("num_transformer_submodules", "num_tasks", "num_layers", "num_ranks")
    ]
    count = (config.num_virtual_tokens or 1) * (config.token_dim or 1) * math.prod(sizes)
    if count > limits.FREE_ELEMENTS + limits.ELEMENTS_SHARE * sum(shape_of(p).numel() for p in base.parameters()):
        raise ConfigError(
            f"the prompt's config asks for some {count:,} numbers, absurdly more than its base has: it is damaged, or made to "
            "take memory. If it is right, raise graftlet.limits.FREE_ELEMENTS."
        )


def _words(base: nn.Module) -> Any:
    getter = getattr(base, "get_input_embeddings", None)
    words = getter() if callable(getter) else None
    if not transformers_config(base) or not isinstance(getattr(words, "weight", None), Tensor):
        raise ConfigError(
            f"a prompt method needs a transformers model with a config and input embeddings; {type(base).__name__} is "
            "none. Use a method that works on layers, such as LoRA."
        )
    return words


def fill(config: PromptLearningConfig, base: Any, words: Any, cached: bool) -> None:
    """Fill in the sizes that a config leaves open, from the model's own config."""
    if config.num_virtual_tokens is None or config.num_virtual_tokens < 1:
        raise ConfigError(f"num_virtual_tokens={config.num_virtual_tokens!r}; a positive number is needed.")
    if cached and not set(CACHES) & set(prompted.parameters(base)):
        raise ConfigError(f"{type(base).__name__} has no key-value cache, which a prefix needs; use prompt tuning.")
    if cached:
        prefix.check_kind(base)
    sizes = _sizes(base, int(shape_of(words.weight)[1]), cached)
    needed = ("token_dim", "num_layers", "num_attention_heads") if cached else ("token_dim",)
    for field in needed:
        given, own = getattr(config, field), sizes[field]
        if given is None and own is None:
            raise ConfigError(f"the model's config does not tell {field}; give it in {type(config).__name__}.")
        if own is not None and given not in (None, own):
            raise ConfigError(
                f"{type(config).__name__}.{field}={given}, but the model's is {own}: the prompt was made for another "
                "base, or the field should be left out."
            )
    sizes["num_transformer_submodules"] = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    for field, size in sizes.items():
        if getattr(config, field) is None:
            setattr(config, field, size)
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim  # type: ignore[attr-defined]


def _sizes(base: Any, dim: int, cached: bool) -> dict[str, int | None]:
    """What a model's config says of its sizes."""
    text = prefix.text_config(base)
    queries = prefix.size_of(text, QUERIES)
    if cached:
        return prefix.sizes(text, dim, queries)
    return {"token_dim": dim, "num_layers": prefix.size_of(text, prefix.LAYERS), "num_attention_heads": queries}


def detach(model: Any, name: str) -> None:
    """Forget an adapter."""
    model.prompt_encoder.drop(name)
    model._prompt_configs.pop(name)
    for _, host in hosts(model.base_model):
        host.delete_adapter(name)


def activate(model: Any, name: str, inference_mode: bool) -> None:
    """Make an adapter the active one; it alone learns, and not in inference mode."""
    model._active = [name]
    for other, encoder in model.prompt_encoder.items():
        encoder.requires_grad_(other == name and not inference_mode)
    for _, host in hosts(model.base_model):
        host.set_adapter([name], inference_mode)


def set_requires_grad(model: Any, names: list[str], requires_grad: bool) -> None:
    """Let adapters learn, or freeze them."""
    for name in names:
        model.prompt_encoder[name].requires_grad_(requires_grad)
        for _, host in hosts(model.base_model):
            host.set_requires_grad(name, requires_grad)


def rename(model: Any, old: str, new: str) -> None:
    """Give an adapter another name."""
    model.prompt_encoder.rename(old, new)
    renamed(model._prompt_configs, old, new)
    lifecycle.rename_adapter(model.base_model, old, new)


def collect(model: Any, name: str) -> dict[str, Tensor]:
    """An adapter's tensors, by their key in the file."""
    return {**model.prompt_encoder[name].saved(), **state.collect(model, name)}


def tensors(model: Any, name: str) -> list[Tensor]:
    """All that an adapter's prompt is made of."""
    encoder = model.prompt_encoder[name]
    return [*encoder.parameters(), *encoder.buffers()]


def misfit(model: Any, name: str, given: Mapping[str, Tensor]) -> state.Fit:
    """How a file's tensors fit an adapter."""
    own = {key: state.Slot(tensor) for key, tensor in model.prompt_encoder[name].saved().items()}
    return state.fit({**own, **state.slots(model, name)}, given)


@torch.no_grad()
def load(
    model: Any, name: str, given: Mapping[str, Tensor], ignore_mismatched_sizes: bool = False
) -> tuple[list[str], list[str]]:
    """Put tensors into an adapter; returns what is missing and what does not belong.

    Raises `AdapterFileError` where one has another shape or kind (unless `ignore_mismatched_sizes`); nothing was
    changed then.
    """
    report = misfit(model, name, given)
    if (report.misshaped or report.mistyped) and not ignore_mismatched_sizes:
        raise AdapterFileError(f"tensors for adapter {name!r} do not fit: {'; '.join(report.complaints())}.")
    wrong = {complaint.split(" ")[0] for complaint in (*report.misshaped, *report.mistyped)}
    fitting = {key: tensor for key, tensor in given.items() if key not in wrong}
    model.prompt_encoder[name].assign(fitting)
    state.fill(state.slots(model, name), fitting, name)
    return report.missing, report.unexpected
