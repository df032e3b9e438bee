# SPDX-License-Identifier: Apache-2.0
"""Getting a model ready to train: quantised bases, mixed precision."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..errors import CallWarning, ConfigError, warn

QUANTISED = ("is_loaded_in_8bit", "is_loaded_in_4bit")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a (quantised) base, keep its small half-precision parts (norms, embeddings, head) in float32, and switch
    gradient checkpointing on in a way that lets gradients reach the adapters.

    Args:
        gradient_checkpointing_kwargs: go to the model's `gradient_checkpointing_enable`.
        auto_clear_cache: give the accelerator's freed memory back after each cast.
    """
    quantised = any(getattr(model, flag, False) for flag in QUANTISED)
    method = getattr(getattr(model, "quantization_method", None), "value", None)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if method not in ("gptq", "aqlm", "eetq", "torchao", "awq", "hqq"):
        _widen(model, auto_clear_cache)
    if (quantised or method) and use_gradient_checkpointing:
        _checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def _widen(model: nn.Module, clear: bool) -> None:
    """Half-precision parameters in float32; packed quantised ones, which are of classes of their own, as they are."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(torch.float32)
            if clear and parameter.device.type == "cuda":
                torch.cuda.empty_cache()


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        if callable(getattr(model, "enable_input_require_grads", None)):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    takes = "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters
    if options and not takes:
        warn(CallWarning, "this version of transformers takes no gradient_checkpointing_kwargs; they are ignored.")
    model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if takes else {}))


def plain(model: Any) -> Any:
    """A model whose quantised layers were all made ordinary ones: it says no more of itself that it is quantised.

    All of it is in the one dtype that its config names: quantised layers cast what they are given, ordinary ones do not.
    """
    for flag in ("hf_quantizer", "quantization_method", "is_quantized", *QUANTISED):
        model.__dict__.pop(flag, None)
    config = getattr(model, "config", None)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if config is not None and name in vars(config):
            delattr(config, name)
    dtype = getattr(config, "dtype", None)
    for parameter in model.parameters() if isinstance(dtype, torch.dtype) else ():
        if parameter.is_floating_point() and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(dtype)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in half precision `dtype`, trained ones in float32: what an autocast training step wants.

    Raises `ConfigError` for another dtype than float16 and bfloat16.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"cast_mixed_precision_params: dtype={dtype}; allowed: torch.float16, torch.bfloat16.")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
