# SPDX-License-Identifier: Apache-2.0
"""Poly: Polytropon, adapters mixed from shared skills (arXiv 2202.13914).   y += x A_t B_t / r

A and B of each row's task t are weighted means of those of all skills; the weights are the task's own. With more than
one split (multi-head routing, 2211.03831) every part of the inputs and of the outputs is mixed by weights of its own:
A `[splits, skills, in / splits, r]`, B `[splits, skills, r, out / splits]`, logits `[tasks, splits * skills]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Excludes, PeftConfig, Saves, Targets
from ..core.context import current
from ..core.method import Routed, Spec, View
from ..errors import CallError
from ..registry import method
from ..weights.site import Conv1D, Linear, Site


@dataclass(kw_only=True)
class PolyConfig(Targets, Excludes, Saves, PeftConfig):
    """Poly. A call says each row's task by `task_ids`, a tensor of numbers from 0 up; with one task it need not.

    Args:
        r: the rank. n_tasks, n_skills: how many there are. n_splits: parts that are mixed apart; it divides a layer's
            inputs and outputs. poly_type: "poly".
        init_weights: True (zero B: no change at first) or False (random).
    """

    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def check(self) -> None:
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            self.require(getattr(self, name) > 0, f"{name}={getattr(self, name)}; a positive number is needed.")


@method("poly", PolyConfig, sites=(Linear, Conv1D))
class Poly(Routed):
    unmergeable = "each row of a batch has a weight of its own, by its task"
    carries = ("task_ids",)

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, PolyConfig)
        sizes = (site.features_in, site.features_out)
        fits = not any(size % config.n_splits for size in sizes)
        config.require(fits, f"n_splits={config.n_splits} does not divide the inputs and outputs {sizes} of {key!r}.")
        return {}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        n, skills = p.n_splits, p.n_skills
        return {
            "poly_router.module_logits": Spec((p.n_tasks, n * skills)),
            "poly_lora_A": Spec((n, skills, site.features_in // n, p.r)),
            "poly_lora_B": Spec((n, skills, p.r, site.features_out // n)),
        }

    def init(self, p: View) -> None:
        p.poly_router_module_logits.uniform_(-1e-3, 1e-3)
        p.poly_lora_A.uniform_(-1, 1).div_(p.site.features_in**0.5)
        if p.init_weights:
            p.poly_lora_B.zero_()
        else:
            p.poly_lora_B.uniform_(-1, 1).div_(p.r**0.5)

    def update(self, p: View, x: Tensor) -> Tensor:
        odds = weights(p, tasks(p, x))
        A = torch.einsum("bks,ksir->bkir", odds, p.poly_lora_A).flatten(1, 2)
        B = torch.einsum("bks,ksro->brko", odds, p.poly_lora_B).flatten(2)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return (rows @ A @ B / p.r).reshape(*x.shape[:-1], -1)


def tasks(p: View, x: Tensor) -> Tensor:
    """Each row's task."""
    call, count = current(), x.shape[0]
    found = None if call is None else call.value("task_ids", count)
    if found is None and (p.n_tasks > 1 or (call is not None and "task_ids" in call.values)):
        given = "none" if call is None or "task_ids" not in call.values else str(tuple(call.values["task_ids"].shape))
        raise CallError(
            f"Poly with n_tasks={p.n_tasks} needs task_ids, a number for each of {count} rows; given: {given}."
        )
    if found is None:
        return torch.zeros(count, dtype=torch.int64, device=x.device)
    if found.device.type == "cpu" and not torch.compiler.is_compiling() and int(found.max()) >= p.n_tasks:
        raise CallError(f"task_ids has task {int(found.max())}; this adapter has {p.n_tasks} tasks, from 0 up.")
    return found.to(x.device)


def weights(p: View, task: Tensor) -> Tensor:
    """The weights of the skills `[rows, splits, skills]`; in training, drawn from relaxed Bernoulli distributions."""
    logits = p.poly_router_module_logits[task].unflatten(1, (p.n_splits, p.n_skills))
    if p.training:
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = logits + torch.logit(u)
    odds = logits.sigmoid()
    return odds / odds.sum(-1, keepdim=True)
