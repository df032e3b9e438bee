# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA: A is averaged over noisy samples in training (arXiv 2411.04358).   A' = A + eps sum_n w_n diag(sqrt v) Z_n

Z_n is normal; v_k = e^(2 s_k) c_k with c_k chi-squared of r degrees, the diagonal of a Wishart matrix; w is a softmax of
normals that stands for Dirichlet weights of the concentration e^u. s and u learn. In evaluation it is LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from . import DeltaWrapper, variant


@dataclass(kw_only=True)
class MontecloraConfig:
    """MonteCLoRA.

    Args:
        num_samples: how many noisy samples A is averaged over. use_entropy: reward even weights among them.
        dirichlet_prior: the concentration that the samples' weights start at. sample_scaler: how strong the noise is.
        kl_loss_weight: the weight of the divergence from the prior in the loss. buffer_size: how many draws of noise are
            made at a time; kept for files of the format, nothing is drawn ahead.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"MontecloraConfig: {name}={getattr(self, name)}; a positive number is needed.")


NAME = "lora_monteclora_sampler"
LEAST = 1e-3
"""The least variance."""


@variant("monteclora_config")
class MonteCLoRA(DeltaWrapper):
    sites = (Linear,)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        n = p.monteclora_config.num_samples
        learning = {"std_prior": Spec((p.r,)), "expert_weights_prior": Spec((n,))}
        last = {"gaussian_var_prior": Spec((p.r, p.r), trainable=False), "expert_weights": Spec((n,), trainable=False)}
        return {**self.inner.params(site, p), **{f"{NAME}.{k}": s for k, s in {**learning, **last}.items()}}

    def init(self, p: View) -> Tensor | None:
        held(p, "std_prior").uniform_()
        held(p, "expert_weights_prior").uniform_()
        held(p, "gaussian_var_prior").copy_(torch.eye(p.r))
        held(p, "expert_weights").fill_(1 / p.monteclora_config.num_samples)
        return self.inner.init(p)

    def update(self, p: View, x: Tensor) -> Tensor:
        if not p.training:
            return self.inner.update(p, x)
        n = p.monteclora_config.num_samples
        Z = torch.randn(n, p.r, p.site.features_in, dtype=p.lora_A.dtype, device=x.device)
        return self.inner.update(p.over({"lora_A": p.lora_A + noise(p, Z, variances(p), weights(p))}), x)

    def penalty(self, views: Sequence[View]) -> Tensor:
        """The mean over layers of what the noise is away from its prior, for a draw of its own."""
        return torch.stack([loss(p, variances(p), weights(p)) for p in views]).mean()


def held(p: View, name: str) -> Tensor:
    """A tensor of the sampler."""
    return getattr(p, f"{NAME}_{name}")


def variances(p: View, chi: Tensor | None = None) -> Tensor:
    """A draw of v `[r]`; chi: the chi-squared numbers that it is made of."""
    s = held(p, "std_prior")
    if chi is None:
        chi = torch.randn(p.r, p.r, dtype=s.dtype, device=s.device).square().sum(0)
    return ((2 * s).exp() * chi).clamp_min(LEAST)


def weights(p: View, normal: Tensor | None = None) -> Tensor:
    """A draw of w `[samples]`; normal: the normal numbers that it is made of."""
    u = held(p, "expert_weights_prior")
    alpha, n = u.exp().clamp_min(1e-6), len(u)
    variance = ((1 - 2 / n) / alpha + (1 / alpha).sum() / n**2).clamp_min(1e-6) + 1e-6
    normal = torch.randn_like(u) if normal is None else normal
    return torch.softmax(alpha.log() - alpha.log().mean() + variance.sqrt() * normal, 0)


def noise(p: View, Z: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """What A is moved by, `[r, in]`, for normal numbers `[samples, r, in]`."""
    return p.monteclora_config.sample_scaler * v.sqrt()[:, None] * torch.einsum("n,nri->ri", w, Z)


def loss(p: View, v: Tensor, w: Tensor) -> Tensor:
    """The divergences of the weights' Dirichlet, of the variances' Wishart and of the samples' normal law from their
    priors, and how uneven the weights are."""
    options: MontecloraConfig = p.monteclora_config
    u, s, r = held(p, "expert_weights_prior"), held(p, "std_prior"), p.r
    dirichlet = dirichlet_divergence(u.exp(), torch.full_like(u, options.dirichlet_prior))
    wishart = r * gaussian_divergence((2 * s).exp())
    divergence = dirichlet + wishart + options.num_samples * gaussian_divergence(v)
    return options.kl_loss_weight * divergence + (w.square().sum() if options.use_entropy else 0)


def dirichlet_divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(Dirichlet(a) | Dirichlet(b))."""
    scale = a.sum().lgamma() - a.lgamma().sum() - b.sum().lgamma() + b.lgamma().sum()
    return scale + ((a - b) * (a.digamma() - a.sum().digamma())).sum()


def gaussian_divergence(v: Tensor) -> Tensor:
    """KL(N(0, diag v) | N(0, 1))."""
    return 0.5 * (v - v.log() - 1).sum()


class MontecloraTrainerMixin:
    """Kept for callers of the reference: the loss of a model with MonteCLoRA has its penalty already, in any Trainer."""
