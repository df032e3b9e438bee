# SPDX-License-Identifier: Apache-2.0
"""The base model and its tokenizer, loaded as a recipe says; device, number type and threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from ..model.auto import base_class_of
from ..model.prepare import prepare_model_for_kbit_training
from ..requirements import REQUIREMENTS
from .recipe import ModelTable, QuantizationTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` takes an accelerator where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device = {name!r} is no device; use auto, cpu, cuda, cuda:1 or mps.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {name!r}, but torch sees no CUDA device here; use auto or cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type of a name; `auto` is bfloat16 on a device that computes in it, else float32."""
    if name == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    return getattr(torch, name)


def computes_in_bfloat16(device: torch.device) -> bool:
    """A processor without the instructions can do it too, but takes ten times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known = (
        getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if torch.backends.mkldnn.is_available() else None
    )
    return device.type == "cpu" and known is not None and known()


def set_threads(threads: int | str) -> int:
    """Let torch use so many CPU threads, and say how many.

    `auto` takes the cores that are free now. One thread on a core that another process keeps busy makes all others wait
    for it at every operation: a training step then takes ten times as long.
    """
    count = threads if isinstance(threads, int) else _free_cores()
    torch.set_num_threads(count)
    return count


def _free_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import psutil
    except ImportError:
        return cores
    busy, sharing = psutil.cpu_percent(interval=0.3) / 100, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores, round(cores * (1 - busy))) // sharing)


def load_tokenizer(folder: str, table: ModelTable) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with a padding token and the recipe's chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, revision=table.revision)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"the tokenizer of {table.source!r} cannot be loaded: {error}") from error
    if table.chat_template:
        own = Path(table.chat_template)
        tokenizer.chat_template = (
            own.read_text() if len(table.chat_template) < 250 and own.is_file() else table.chat_template
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {folder!r} has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    folder: str,
    table: ModelTable,
    quantization: QuantizationTable | None = None,
    task: str = "CAUSAL_LM",
    head: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The base model on its device, in its number type; quantised where asked for, and ready to train an adapter on.

    task: an adapter's task type, which says the model's class. head: what that is to be told beside, such as `num_labels`.

    Raises `DependencyError` where the package that quantises is missing or too old.
    """
    import transformers

    device = pick_device(table.device)
    dtype = pick_dtype(table.dtype, device)
    packed = {} if quantization is None else _quantised(quantization, device, dtype)
    try:
        model: Any = getattr(transformers, base_class_of(task)).from_pretrained(
            folder,
            revision=table.revision,
            dtype=dtype,
            attn_implementation=table.attention,
            **packed,
            **(head or {}),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"the base model {table.source!r} cannot be loaded: {error}") from error
    model.config.use_cache = False  # of no use in training, and transformers packs only without it
    if quantization is None:
        return model if _placed_by_engine() else model.to(device)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # which the training table asks for


def _placed_by_engine() -> bool:
    """Whether an engine that keeps a model in parts takes it from where it was loaded."""
    return any(os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true" for engine in ("FSDP", "DEEPSPEED"))


def _quantised(table: QuantizationTable, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers is to be told so that a model comes quantised, and stands on the device from the start."""
    from transformers import BitsAndBytesConfig

    REQUIREMENTS["bnb"].check()
    skip = table.skip or None
    if table.method == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=table.method,
            bnb_4bit_use_double_quant=table.double,
            bnb_4bit_compute_dtype=dtype if table.compute == "auto" else getattr(torch, table.compute),
            llm_int8_skip_modules=skip,
        )
    return {"quantization_config": config, "device_map": {"": device}}
