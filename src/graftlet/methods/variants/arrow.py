# SPDX-License-Identifier: Apache-2.0
"""Arrow: each token routed to experts by their directions (arXiv 2405.11157).   y += sum_e c_e s_e B_e A_e x

c is a softmax over the k largest of |v_e x|, where v_e is the top right singular vector of B_e A_e: the input that the
expert answers most strongly. The experts are the plain LoRA adapters on the router's layer. With general knowledge
subtracted (GenKnowSub, ACL 2025 short 54), each of an expert's factors is less the mean of the general adapters' ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.kernel import without_autocast
from ...core.method import Delta, Routed, View
from ...errors import CallError, ConfigError
from ...weights.site import Linear
from . import Wrapper, variant


@dataclass(kw_only=True)
class ArrowConfig:
    """Arrow.

    Args:
        top_k: how many experts serve a token. router_temperature: what their scores are divided by.
        use_gks: take the mean of general adapters out of the experts. task_adapter_names, gks_adapter_names: the experts,
            and the general adapters; `create_arrow_model` fills them in. rng_seed: kept for files of the format.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "router_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"ArrowConfig: {name}={getattr(self, name)}; a positive number is needed.")


@variant("arrow_config")
class Arrow(Wrapper, Routed):
    """The router. Its own factors are part of the format, and idle."""

    sites = (Linear,)
    excludes = ("lora_bias", "target_parameters")
    unmergeable = "each token goes to experts of its own"

    def __init__(self, inner: Delta) -> None:
        super().__init__(inner)
        self._known: tuple[Any, Tensor] | None = None  # what the directions were found from, and they

    def update(self, p: View, x: Tensor) -> Tensor:
        experts, general = self.experts(p)
        mean = mean_of(general)
        share = shares(p, x @ self.directions(experts, general).to(x.dtype).T)
        hidden = [F.linear(x, e.lora_A) for e in experts]
        if mean is not None:
            shift = F.linear(x, mean[0])
            hidden = [h - shift for h in hidden]
        hidden = [h * share[..., i, None] * e.scaling for i, (h, e) in enumerate(zip(hidden, experts, strict=True))]
        y = F.linear(torch.cat(hidden, -1), torch.cat([e.lora_B for e in experts], 1))
        if mean is not None:
            y = y - F.linear(torch.stack(hidden).sum(0), mean[1])
        return p.lora_dropout(y)

    def experts(self, p: View) -> tuple[list[View], list[View]]:
        """The experts on a layer, and the general adapters whose mean is to be subtracted from them."""
        general = p.arrow_config.gks_adapter_names or []
        views = {name: view for name, (method, view) in p.peers.items() if type(method) is type(self.inner)}
        experts = [view for name, view in views.items() if name not in general]
        if not experts:
            raise CallError(f"the router {p.adapter!r} finds no LoRA adapter beside it on {p.key!r}; load its experts.")
        return experts, [views[name] for name in general] if p.arrow_config.use_gks else []

    @torch.no_grad()
    def directions(self, experts: list[View], general: list[View]) -> Tensor:
        """Each expert's direction, `[experts, in]`; found again when a tensor that they come from has changed."""
        sources = [t for view in [*experts, *general] for t in (view.lora_A, view.lora_B)]
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return found(experts, general)
        state = [(id(t), t.data_ptr(), t._version) for t in sources]
        if self._known is None or self._known[0] != state:
            self._known = state, found(experts, general)
        return self._known[1]


def mean_of(general: list[View]) -> tuple[Tensor, Tensor] | None:
    """The mean factors of the general adapters; None where there are none."""
    if not general:
        return None
    return torch.stack([g.lora_A for g in general]).mean(0), torch.stack([g.lora_B for g in general]).mean(0)


def found(experts: list[View], general: list[View]) -> Tensor:
    """The directions of experts less the mean of the general adapters."""
    A0, B0 = mean_of(general) or (0, 0)
    return torch.stack([direction(e.lora_A - A0, e.lora_B - B0) for e in experts])


def direction(A: Tensor, B: Tensor) -> Tensor:
    """The top right singular vector of B A, by a problem of its rank's size; zero where the product is."""
    A, B = A.float(), B.float()
    with without_autocast(A.device):  # half precision tells no directions apart, nor can all devices do it
        Q, R = torch.linalg.qr(A.T)
        values, vectors = torch.linalg.eigh(R @ (B.T @ B) @ R.T)
        return Q @ vectors[:, -1] * (values[-1] > 0)


def shares(p: View, match: Tensor) -> Tensor:
    """What part of a token's update each expert makes, from how each matches it `[..., experts]`."""
    match = match.abs()
    best = match.topk(min(p.arrow_config.top_k, match.shape[-1]), dim=-1)
    kept = torch.full_like(match, -torch.inf).scatter(-1, best.indices, best.values)
    return (kept / p.arrow_config.router_temperature).softmax(-1)
