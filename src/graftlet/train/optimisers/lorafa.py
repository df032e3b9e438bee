# SPDX-License-Identifier: Apache-2.0
"""LoRA-FA: A is frozen, and B's gradient is corrected for it (arXiv 2308.03303, LoRA-FA).   gB <- gB (A A^T)^-1 / s^2

With A frozen, the input of a layer need not be kept for its gradient: only A x, of r numbers a token. The correction makes
the change of the weight the nearest to that of full fine-tuning. The step itself is AdamW's, or that of any class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import ConfigError
from . import Factors, check_pairs, optimiser_class, turning

DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, with a correction of the gradient for the parameters that `factors` has, by id.

    Args:
        params: parameters or groups. lr, betas, eps, weight_decay: AdamW's; the decay comes after the step.
        correct_bias: correct the averages for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value, most in (
            ("lr", lr, math.inf),
            ("betas", min(betas), 1),
            ("betas", max(betas), 1),
            ("eps", eps, 9),
        ):
            if not 0 <= value < most:
                raise ConfigError(f"{name}={value!r}; allowed: 0 up to, not with, {most}.")
        self.factors: dict[int, Factors] = {}
        facts = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, {"lr": lr, **facts})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; a parameter without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    pair = self.factors.get(id(parameter))
                    self._move(parameter, parameter.grad if pair is None else corrected(pair), group)
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].mul_(b1).add_(grad, alpha=1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def corrected(pair: Factors) -> Tensor:
    """B's gradient with the frozen A taken into account."""
    assert pair.B.grad is not None
    A = pair.A.float()
    damped = A @ A.T + DAMPING * torch.eye(len(A), device=A.device)
    grad = pair.B.grad.float() @ torch.linalg.pinv(damped, hermitian=True)
    return (grad / pair.scaling**2).to(pair.B.dtype)


@torch.no_grad()
def correct(factors: Sequence[Factors]) -> None:
    """Correct the gradients of these pairs' B in place."""
    for pair in factors:
        if pair.B.grad is not None:
            pair.B.grad.copy_(corrected(pair))


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
    optimizer_cls: type[Optimizer] | None = None,
    **kwargs: Any,
) -> Optimizer:
    """Freeze every `lora_A` of a model, and make the optimiser for the rest.

    optimizer_cls: the class whose steps are made, given `kwargs`; unless it is said, AdamW with the decay after the step.
    r, lora_alpha, use_rslora: kept for callers of the reference; each layer's own scaling is used.
    """
    found = check_pairs(model, "lorafa")
    for pair in found:
        pair.A.requires_grad_(False)
    if optimizer_cls is not None:
        values = {"lr": lr, "weight_decay": weight_decay, **kwargs}
        return turning(optimizer_cls, partial(correct, found), model, "LoraFA", **values)
    optimizer = LoraFAOptimizer(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, **kwargs
    )
    optimizer.factors = {id(pair.B): pair for pair in found}
    return optimizer


def for_recipe(model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]) -> Optimizer:
    """LoRA-FA as a recipe asks for it: `base` (an optimiser's class; LoRA-FA's own AdamW unless given)."""
    options = dict(options)
    base = options.pop("base", None)
    kind = None if base is None else optimiser_class(base)
    return create_lorafa_optimizer(model, lr=lr, weight_decay=weight_decay, optimizer_cls=kind, **options)
