# SPDX-License-Identifier: Apache-2.0
"""A model with its adapter, whole but for the numbers: every parameter is there, on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.kernel import rehearsal
from ...errors import ConfigError
from ...model.mapping import get_peft_model
from ...model.optimised import optimize_model
from ...model.prepare import prepare_model_for_kbit_training
from .ledger import parts_of
from .packed import FORMATS, PackedLinear, pack
from .setup import HEADS, Setup


def build(setup: Setup) -> tuple[Any, list[Tensor]]:
    """The model as it would be trained, and the tensors of its base.

    Raises `ConfigError` where it cannot be made without the weights' own numbers; whatever an adapter's config is refused
    for is raised as it is.
    """
    with quiet():
        base = _base(setup)
        held = parts_of(base)
        model = base if setup.adapter is None else _adapted(base, setup)
        if setup.checkpointing:
            _checkpoint(model, setup.adapter is not None)
        if setup.optimised:
            with rehearsal(setup.device.kind):
                optimize_model(model)
        return model.train(), held


def _base(setup: Setup) -> Any:
    import transformers

    kind = HEADS.get(setup.task)
    if kind is None:
        raise ConfigError(f"estimate: task_type={setup.task!r} has no model of transformers.")
    try:
        with torch.device("meta"):
            how = {} if setup.attention is None else {"attn_implementation": setup.attention}
            base = getattr(transformers, kind).from_config(setup.config, dtype=setup.dtype, **how)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        said = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"estimate: transformers makes no {kind} of a {type(setup.config).__name__}: {said}"
        ) from error
    base.config.use_cache = False
    if getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = 0  # a tokenizer's, without which a classifier takes no batch
    if setup.adapter is not None:
        base.requires_grad_(False)
    if setup.quantisation is not None:
        kept = FORMATS[setup.quantisation]
        pack(base, type(kept)(kept.bits, setup.double), setup.dtype, list(setup.skip))
        base.is_loaded_in_4bit = kept.bits == 4
        base.is_loaded_in_8bit = kept.bits == 8
        if setup.prepared:
            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return base


def _adapted(base: nn.Module, setup: Setup) -> Any:
    widen = setup.adapter_dtype is None or setup.adapter_dtype == torch.float32
    assert setup.adapter is not None
    try:
        with torch.device("meta"):
            model = get_peft_model(base, setup.adapter, autocast_adapter_dtype=widen)
    except NotImplementedError as error:
        if isinstance(error, ConfigError) or "meta" not in str(error):
            raise
        raise ConfigError(
            f"estimate: what {setup.adapter.peft_type} has on a layer depends on the numbers of its weight, which are not "
            "loaded; its size cannot be told beforehand."
        ) from error
    if setup.adapter_dtype is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(setup.adapter_dtype)
    return model


def _checkpoint(model: Any, frozen: bool) -> None:
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(f"estimate: {type(model).__name__} has no gradient checkpointing.")
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if frozen:
        model.enable_input_require_grads()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that are for whoever trains, which are given when that is done."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers learn, and how many there are in all; of layers in few bits, as many as they stand for."""
    own: Any = getattr(model, "get_nb_trainable_parameters", None)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear)}
    total = sum(packed.get(id(p), p.numel()) for p in model.parameters())
    return learning if own is None else own()[0], total
