# SPDX-License-Identifier: Apache-2.0
"""LoRA+: the learning rate of B is a multiple of that of A (arXiv 2402.12354).   lr_B = ratio lr_A

B starts at zero and has to grow; A only turns. Any optimiser class does, since it is a matter of parameter groups.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError
from . import check_pairs, eight_bit, keep_embeddings_exact, optimiser_class

EMBEDDING_LR = 1e-6


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser of any class whose groups are: A and other matrices; embeddings' factors; B and vectors; biases and norms.

    Args:
        lr: A's learning rate. loraplus_lr_ratio: B's over A's, at least 1; 16 is usual, with an lr of half the ordinary.
        kwargs: `loraplus_weight_decay` (0; never on biases and norms), `loraplus_lr_embedding` (1e-6); the rest goes to
            the optimiser.
    """
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio={loraplus_lr_ratio!r}; a positive number is needed, 1 or more as a rule.")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    rates = {"A": lr, "embedding": kwargs.pop("loraplus_lr_embedding", EMBEDDING_LR)}
    rates |= {"B": lr * loraplus_lr_ratio, "bare": lr * loraplus_lr_ratio}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    normed = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter, id(parameter) in normed)].append(parameter)
    made = [
        {"params": groups[name], "lr": rate, "weight_decay": 0.0 if name == "bare" else decay}
        for name, rate in rates.items()
    ]
    make: Any = optimizer_cls
    optimizer = make(made, lr=lr, **kwargs)
    if eight_bit(optimizer_cls):
        keep_embeddings_exact(model)
    return optimizer


def _group(name: str, parameter: nn.Parameter, of_norm: bool) -> str:
    if ".lora_embedding_" in name:
        return "embedding"
    if "lora_B" not in name and parameter.dim() != 1:
        return "A"
    return "bare" if of_norm or "bias" in name else "B"


def for_recipe(model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]) -> Optimizer:
    """LoRA+ as a recipe asks for it: `ratio` (16), `embedding_lr`, `base` (an optimiser's class, AdamW)."""
    options = dict(options)
    check_pairs(model, "loraplus")
    return create_loraplus_optimizer(
        model,
        optimiser_class(options.pop("base", "AdamW")),
        lr=lr,
        loraplus_lr_ratio=options.pop("ratio", 16.0),
        loraplus_weight_decay=weight_decay,
        loraplus_lr_embedding=options.pop("embedding_lr", EMBEDDING_LR),
        **options,
    )
