# SPDX-License-Identifier: Apache-2.0
"""Small answers about a model, under the reference's names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import lifecycle
from ..core.prompt import Cache, Prompt
from ..core.target import by_pattern, matches
from ..errors import CallError
from ..patterns import fullmatch


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The module above a path, the module at it, and the path's last name."""
    above, _, name = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Let an adapter not learn."""
    lifecycle.set_requires_grad(model, adapter_name, False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make an adapter, or several together, the active ones."""
    lifecycle.set_adapter(model, adapter_name, inference_mode)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path is, or ends in, a dotted name."""
    return matches(key, [target_key])


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The rows of a call. Raises `CallError` where it has neither or both."""
    given = [t for t in (input_ids, inputs_embeds) if t is not None]
    if len(given) != 1:
        raise CallError("a call needs either input_ids or inputs_embeds, and not both.")
    return given[0].shape[0]


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The last name in the path of a model's input embeddings; `default` where it does not say which they are."""
    ask = getattr(model, "get_input_embeddings", None)
    if not callable(ask):
        return default
    embeddings = ask()
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings), default)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight the other way round, if it is kept so; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T, weight.requires_grad) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells the memory of a tensor from others': its device, its address there, its size in bytes."""
    held = tensor.untyped_storage()
    return tensor.device, held.data_ptr(), held.nbytes()


def infer_device() -> str:
    """The kind of device that there is to compute on: an accelerator's, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def match_target_against_key(target_pattern: str, key: str) -> bool:
    """Whether a regex is a path, or a path's end after a dot."""
    return fullmatch(rf"(.*\.)?({target_pattern})", key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first key of a `rank_pattern` or its like that means a path; the path itself where none does."""
    return by_pattern({key: key for key in pattern_keys}, key_to_match, key_to_match)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """A transformers model's settings of quantisation, where it was quantised by `method`."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    return settings if getattr(settings, "quant_method", None) == method else None


def str_to_bool(value: str) -> int:
    """1 for a word that says yes, 0 for one that says no; other words raise `ValueError`."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"{value!r} says neither yes nor no; give one of y, yes, t, true, on, 1, n, no, f, false, off, 0.")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository of the hub has a file; None where it cannot be asked."""
    from huggingface_hub import constants, file_exists

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except Exception:  # no network, no such repository, no right to see it
        return None


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Which modules FSDP shards apart: the model's blocks, prompts' encoders, and each module that learns.

    What learns must not share a flat parameter with what is frozen.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = {type(module) for module in model.modules() if type(module).__name__ in names}

    def learns(module: nn.Module) -> bool:
        own = [*module.parameters()]
        return not [*module.children()] and bool(own) and all(p.requires_grad for p in own)

    whole = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={*blocks, Prompt, Cache})
    return functools.partial(_or_policy, policies=[functools.partial(lambda_auto_wrap_policy, lambda_fn=learns), whole])


EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = tuple(
    name
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if getattr(torch, name, None) is not None
)

_TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+?)_(TARGET|FEEDFORWARD)_MODULES_MAPPING")


def __getattr__(name: str) -> Any:
    """The tables of default targets, `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING` and its like."""
    from ..registry import default_targets, entries

    found = _TABLE.fullmatch(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    short = found[1].replace("_", "")
    method = next((e.name for e in entries() if e.name.replace("_", "") == short), None)
    if method is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: there is no method {short}")
    return default_targets(method if found[2] == "TARGET" else f"{method}.feedforward")
