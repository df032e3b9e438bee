# SPDX-License-Identifier: Apache-2.0
"""OSF: orthogonal subspace fine-tuning (arXiv 2504.07097).   W = Uh Sh Vh + U0 S0 V0,   W' = W - U0 S0 V0 + U S V

The singular directions of W are parted: the largest are kept, the smallest `[out, k]`, `[k]`, `[k, in]` are trained.
The gradient of U (of V) loses what lies in the span of Uh (of Vh), so that learning stays off what is kept. The parts
of W are not saved: a load finds them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import PeftConfig, Saves, Targets
from ..core.method import Delta, Spec, View
from ..patterns import search
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.low_rank import through


@dataclass(kw_only=True)
class OSFConfig(Targets, Saves, PeftConfig):
    """OSF.

    Args:
        effective_rank: how many directions are kept: a number, or up to 1.0 a share of all. None keeps half.
        rank_pattern: other values for layers whose path has a match of a key (a regex).
        target_svd_config: stands in the format; it has no effect, rank_pattern has.
        init_weights: True (the directions of W: no change at first) or False (random).
    """

    reads_patterns: ClassVar[bool] = False

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    def check(self) -> None:
        for name, rank in {"effective_rank": self.effective_rank, **(self.rank_pattern or {})}.items():
            self.require(rank is None or rank > 0, f"{name}={rank}; a positive number is needed.")


@method("osf", OSFConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class OSF(Delta):
    law = "one"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, OSFConfig)
        wanted = config.effective_rank
        wanted = next((v for k, v in (config.rank_pattern or {}).items() if search(k, key)), wanted)
        size = min(site.features_out, site.columns)
        if wanted is None:
            kept = size // 2
        else:
            kept = int(size * wanted) if isinstance(wanted, float) and wanted <= 1 else int(wanted)
        config.require(kept > 0, f"effective_rank={wanted} keeps none of the {size} directions of {key!r}; give more.")
        return {"kept_rank": min(kept, size), "trained_rank": size - min(kept, size)}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        out, inner, k, h = site.features_out, site.columns, p.trained_rank, p.kept_rank
        trained = {"U_low": (out, k), "S_low": (k,), "V_low": (k, inner)}
        frozen = {"U_start": (out, k), "S_start": (k,), "V_start": (k, inner), "U_high": (out, h), "V_high": (h, inner)}
        return {
            **{f"osf_svd_params.{n}": Spec(s) for n, s in trained.items()},
            **{f"osf_svd_params.{n}": Spec.frozen(s) for n, s in frozen.items()},
        }

    def derived(self, config: PeftConfig) -> bool:
        return True

    def init(self, p: View) -> None:
        W = p.site.read()[0].flatten(2 if p.site.stack else 1)
        U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
        h = p.kept_rank
        p.osf_svd_params_U_high.copy_(U[..., :h])
        p.osf_svd_params_V_high.copy_(V[..., :h, :])
        for name, part in {"U": U[..., h:], "S": S[..., h:], "V": V[..., h:, :]}.items():
            start, low = (getattr(p, f"osf_svd_params_{name}_{which}") for which in ("start", "low"))
            start.copy_(part)
            if p.init_weights is False:
                low.normal_()
            else:
                low.copy_(part)

    def delta(self, p: View) -> Tensor:
        A, B = factors(p)
        return (B @ A).reshape(p.site.shape[1:] if p.site.stack else p.site.shape)

    def update(self, p: View, x: Tensor) -> Tensor:
        return through(p.site, x, *factors(p))


def factors(p: View) -> tuple[Tensor, Tensor]:
    """A `[2 k, in]` and B `[out, 2 k]` with B A = U S V - U0 S0 V0: exactly zero at the start."""
    U: Tensor = Beside.apply(p.osf_svd_params_U_low, p.osf_svd_params_U_high)  # pyright: ignore[reportAssignmentType]
    V: Tensor = Beside.apply(p.osf_svd_params_V_low.T, p.osf_svd_params_V_high.T)  # pyright: ignore[reportAssignmentType]
    new, old = p.osf_svd_params_S_low[:, None] * V.T, p.osf_svd_params_S_start[:, None] * p.osf_svd_params_V_start
    return torch.cat([new, old]), torch.cat([U, -p.osf_svd_params_U_start], 1)


class Beside(torch.autograd.Function):
    """U as it is; its gradient without what lies in the span of Q's orthonormal columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor, Q: Tensor) -> Tensor:
        return U.view_as(U)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (Q,) = ctx.saved_tensors
        return grad - Q @ (Q.T @ grad), None
