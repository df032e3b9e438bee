# SPDX-License-Identifier: Apache-2.0
"""Riemannian preconditioning of LoRA's gradients (arXiv 2402.02347).   gA <- (B^T B + reg)^-1 gA,   gB <- gB (A A^T + reg)^-1

The step is then the same however the product is split into its factors. It costs two r x r solves a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import ConfigError
from . import Factors, check_pairs, optimiser_class, turning


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser of any class over all that learns, whose steps see the preconditioned gradients of LoRA's matrices.

    Args:
        lr: the learning rate. reg: what is added to the diagonals. kwargs: go to the optimiser.

    Raises:
        ConfigError: the class is no optimiser or needs a closure; no trained LoRA pair is there. A step with a closure,
            which would make new gradients after they were preconditioned.
    """
    if reg < 0:
        raise ConfigError(f"reg={reg!r}; 0 or more is needed.")
    found = [f for f in check_pairs(model, "the Riemannian optimiser") if f.A.requires_grad and f.B.requires_grad]
    if not found:
        raise ConfigError("the Riemannian optimiser needs a LoRA pair both of whose matrices learn.")
    return turning(optimizer_cls, partial(precondition, found, reg), model, "Riemannian", lr=lr, **kwargs)


@torch.no_grad()
def precondition(factors: Sequence[Factors], reg: float) -> None:
    """Turn the gradients of these pairs, in at least single precision."""
    for pair in factors:
        wide = torch.promote_types(pair.A.dtype, torch.float32)
        A, B = pair.A.to(wide), pair.B.to(wide)
        if pair.A.grad is not None:
            pair.A.grad.copy_(_inverse(B.T @ B, reg) @ pair.A.grad.to(wide))
        if pair.B.grad is not None:
            pair.B.grad.copy_(pair.B.grad.to(wide) @ _inverse(A @ A.T, reg))


def _inverse(gram: Tensor, reg: float) -> Tensor:
    """The inverse of a damped Gram matrix; the pseudo-inverse where it is singular."""
    return torch.linalg.pinv(gram + reg * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), hermitian=True)


def for_recipe(model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]) -> Optimizer:
    """The Riemannian optimiser as a recipe asks for it: `reg` (0.01), `base` (an optimiser's class, AdamW)."""
    options = dict(options)
    base = optimiser_class(options.pop("base", "AdamW"))
    return create_riemannian_optimizer(model, base, lr=lr, weight_decay=weight_decay, **options)
