# SPDX-License-Identifier: Apache-2.0
"""PSOFT: orthogonal fine-tuning in the principal subspace (openreview FSHrinMArK).   dW = s B (diag(b) R diag(a) - I) A

A `[r, in]` and B `[out, r]` are the largest singular directions of W, frozen, so that s B A is W's principal part, which
is turned by R and scaled on both sides. R is the Cayley transform (I + Q) (I - Q)^-1 of a skew-symmetric Q, whose upper
triangle is trained, or the first terms of its Neumann series. A and B are found again in W at every load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core.method import Spec, View
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.dropout import input_dropout
from .parts.low_rank import LowRank
from .parts.rotation import cayley, identity, neumann, skew


@dataclass(kw_only=True)
class PsoftConfig(Targets, Excludes, Layers, Saves, FanInFanOut, PeftConfig):
    """PSOFT.

    Args:
        r: the subspace's dimension. psoft_alpha: s is psoft_alpha / r; it scales no more than how s B A is written.
        psoft_dropout: dropout on the adapter's input.
        ab_svd_init: the singular values in B ("psoft_init") or half in each factor ("pissa_init").
        psoft_svd: "full", or "lowrank", which is faster and random, with psoft_svd_lowrank_niter iterations from
            random_seed.
        psoft_orth: train Q; otherwise all of R, which then may be any matrix. psoft_mag_a, psoft_mag_b: train a, b.
        use_cayley_neumann: the series, of num_cayley_neumann_terms terms, instead of solving exactly; with
            cayley_neumann_eps, Q is first shrunk to |Q| <= eps.
        init_weights: True (R = I: no change at first) or False (random).
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def check(self) -> None:
        for name in ("r", "psoft_alpha", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter"):
            value = getattr(self, name)
            self.require(value > 0, f"{name}={value}; a positive number is needed.")
        self.require(0 <= self.psoft_dropout < 1, f"psoft_dropout={self.psoft_dropout}; allowed: 0 up to, not with, 1.")
        eps = self.cayley_neumann_eps
        self.require(
            eps is None or 0 < eps < 1, f"cayley_neumann_eps={eps}; None, or a number between 0 and 1, is needed."
        )


@method("psoft", PsoftConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class PSOFT(LowRank):
    dropout = "psoft_dropout"

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, PsoftConfig)
        most = min(site.features_out, site.columns)
        if config.r > most:
            raise ConfigError(f"r={config.r} exceeds the {most} singular directions of {key!r}; lower it.")
        return {
            "scaling": config.psoft_alpha / config.r,
            "psoft_dropout": input_dropout(site, key, "psoft_dropout", config.psoft_dropout),
        }

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        turn = (p.r * (p.r - 1) // 2,) if p.psoft_orth else (p.r, p.r)
        sides = {"psoft_R.vector_b": p.psoft_mag_b, "psoft_R.vector_a": p.psoft_mag_a}
        shapes = {"psoft_A": (p.r, site.columns), "psoft_B": (site.features_out, p.r)}
        return {
            "psoft_R.weight": Spec(turn),
            **{name: Spec((p.r,)) for name, trained in sides.items() if trained},
            **{name: Spec(shape, trainable=False, saved=False, persistent=False) for name, shape in shapes.items()},
        }

    def derived(self, config: PeftConfig) -> bool:
        return True

    def init(self, p: View) -> None:
        p.psoft_R.zero_()
        if not p.init_weights:
            p.psoft_R.normal_(std=0.1)
        if not p.psoft_orth:
            p.psoft_R.add_(torch.eye(p.r, device=p.psoft_R.device))
        for name in ("psoft_R_vector_a", "psoft_R_vector_b"):
            if name in vars(p):
                vars(p)[name].fill_(1)
        W = p.site.read()[0].float()
        U, S, V = principal(W.flatten(W.dim() - len(p.site.kernel) - 1), p)
        S = S[..., None, :] / p.scaling
        halved = p.ab_svd_init == "pissa_init"
        p.psoft_A.copy_((V * S.sqrt() if halved else V).mT)
        p.psoft_B.copy_(U * (S.sqrt() if halved else S))

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        turn = rotation(p) if p.psoft_orth else p.psoft_R
        if p.psoft_mag_b:
            turn = p.psoft_R_vector_b[:, None] * turn
        if p.psoft_mag_a:
            turn = turn * p.psoft_R_vector_a
        change = turn - identity(p.r, turn.dtype, turn.device)
        return p.psoft_A, p.psoft_B @ change.to(p.psoft_B.dtype) * p.scaling


def rotation(p: View) -> Tensor:
    """R `[r, r]`, in at least single precision."""
    v = p.psoft_R.to(torch.promote_types(p.psoft_R.dtype, torch.float32))
    Q = skew(v[None], p.r)[0]
    if not p.use_cayley_neumann:
        return cayley(-Q)
    if p.cayley_neumann_eps is not None:
        Q = Q * (p.cayley_neumann_eps / Q.norm().clamp(min=p.cayley_neumann_eps))
    return neumann(Q, p.num_cayley_neumann_terms)


def principal(W: Tensor, p: View) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values of W with their directions, as columns: U, S, V."""
    if p.psoft_svd == "full":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[..., : p.r], S[..., : p.r], Vh[..., : p.r, :].mT
    with torch.random.fork_rng([W.device] if W.is_cuda else []):
        torch.manual_seed(p.random_seed)
        return torch.svd_lowrank(W, q=p.r, niter=p.psoft_svd_lowrank_niter)
