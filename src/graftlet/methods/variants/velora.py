# SPDX-License-Identifier: Apache-2.0
"""VeLoRA: activations kept for the gradient as one number a group (arXiv 2405.17991).   x ~ scale (x v) v^T, group by group

The forward is LoRA's. For the gradient of A, each group of the input's features is projected on a unit vector v, kept as
that one number, and spread along v again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from . import DeltaWrapper, variant

INITS = ("batch_average", "batch_average_once", "random")


@dataclass(kw_only=True)
class VeloraConfig:
    """VeLoRA.

    Args:
        num_groups: into how many groups the features are split: more are more exact, and take more memory.
        scale: what the restored activations are multiplied by.
        init_type: where v comes from: "batch_average", each batch's mean; "batch_average_once", the first's; "random".
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        if self.num_groups <= 0:
            raise ConfigError(f"VeloraConfig: num_groups={self.num_groups}; a positive number is needed.")
        if self.init_type not in INITS:
            raise ConfigError(f"VeloraConfig: init_type={self.init_type!r}; allowed: {', '.join(INITS)}.")


@variant("velora_config")
class VeLoRA(DeltaWrapper):
    sites = (Linear,)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        width = -(-site.features_in // p.velora_config.num_groups)
        return {**self.inner.params(site, p), "lora_velora_embed": Spec((width,), trainable=False)}

    def init(self, p: View) -> Tensor | None:
        v = p.lora_velora_embed
        v.copy_(unit(torch.randn_like(v))) if p.velora_config.init_type == "random" else v.zero_()
        return self.inner.init(p)

    def update(self, p: View, x: Tensor) -> Tensor:
        if not p.training or not torch.is_grad_enabled():
            return self.inner.update(p, x)
        options: VeloraConfig = p.velora_config
        self._observe(p, x)
        h = Compressed.apply(x, p.lora_A, p.lora_velora_embed.clone(), options.num_groups, options.scale)
        rest = torch.eye(len(p.lora_A), dtype=p.lora_A.dtype, device=x.device)  # A has been through
        return self.inner.update(p.over({"lora_A": rest}), h)

    @torch.no_grad()
    def _observe(self, p: View, x: Tensor) -> None:
        """Take the batch's mean as the direction, where the config wants that."""
        v, options = p.lora_velora_embed, p.velora_config
        if options.init_type == "batch_average" or (options.init_type == "batch_average_once" and not v.any()):
            v.copy_(unit(grouped(x, options.num_groups, len(v)).flatten(0, 1).float().mean(0)))


class Compressed(torch.autograd.Function):
    """x A^T, whose gradient for A is that of `scale (x v) v^T` in place of x. What is kept of x is `x v`, `[rows, groups]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(grouped(x, groups, len(v)) @ v.to(x.dtype), A, v)
        ctx.shape, ctx.scale = x.shape, scale
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, A, v = ctx.saved_tensors
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        to_x = to_A = None
        if ctx.needs_input_grad[0]:
            to_x = (rows @ A.to(rows.dtype)).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            restored = (kept[:, :, None] * v.to(kept.dtype)).flatten(1)[:, : A.shape[1]] * ctx.scale
            to_A = (rows.T @ restored.to(rows.dtype)).to(A.dtype)
        return to_x, to_A, None, None, None


def grouped(x: Tensor, groups: int, width: int) -> Tensor:
    """The features of x in groups, `[rows, groups, width]`, filled up with zeros."""
    return F.pad(x, (0, groups * width - x.shape[-1])).reshape(-1, groups, width)


def unit(v: Tensor) -> Tensor:
    """The vector at length 1; of all directions alike where it is zero."""
    norm = v.norm()
    even = torch.full_like(v, len(v) ** -0.5)
    return torch.where(norm > 0, v / norm.clamp_min(torch.finfo(v.dtype).tiny), even)
