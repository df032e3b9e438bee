# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: start along the gradient (arXiv 2407.05000).   G ~ U S V^T,  A = V_i^T,  B = f U_j S_j;  the base keeps W - s B A

i and j are different directions of the first 2r, by `direction`; f by `scale`: "stable" out^(1/4) / sqrt(gamma), "weight_svd"
the weight's largest singular value over B's, "unit" 1; "gd_scale" divides both factors by s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.method import View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from ...weights.whole import shape_of
from ..data.stream import call, check_all_seen, keep, kept, linear_layers, rank_of, used
from ..data.turns import ROOM, Record, Shown, key_of, measured, progress, turns
from . import start
from .spectral import readable, without


@dataclass(kw_only=True)
class LoraGAConfig:
    """LoRA-GA.

    Args:
        direction: which of the gradient's first 2r directions A and B take: "ArB2r" A the first r and B the next, "A2rBr"
            the other way round, "ArBr" A the odd and B the even ones, "random" at random.
        scale: "stable", "weight_svd", "gd_scale" or "unit", as in the module's formula. stable_gamma: gamma of "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, allowed in (("direction", DIRECTIONS), ("scale", SCALES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"LoraGAConfig: {name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        if self.stable_gamma <= 0:
            raise ConfigError(f"LoraGAConfig: stable_gamma={self.stable_gamma}; a positive number is needed.")


DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@start(
    "lora_ga",
    sites=(Linear,),
    rebases=True,
    needs="preprocess_loraga(model, config, train_step), on the base model",
    before=lambda model, config, batches, shown: preprocess_loraga(
        model, config, partial(_backward, model, batches), show_progress_bar=shown
    ),
)
def lora_ga(p: View, A: Tensor, B: Tensor) -> Tensor:
    """The pair from the gradient's directions that `preprocess_loraga` left on the layer."""
    U, S, V = (t.to(A.device) for t in kept(p.site, "lora_ga"))
    options, r = p.lora_ga_config or LoraGAConfig(), p.r
    if len(S) < 2 * r:
        raise ConfigError(
            f"init_lora_weights='lora_ga' needs 2 r <= {min(p.site.shape)} on {p.key!r}, and preprocess_loraga run with "
            f"this config; r={r} was given."
        )
    rows, columns = _chosen(options.direction, r)
    W = readable(p, "lora_ga")
    first, second = V[:, rows].T, U[:, columns] * S[columns]
    if options.scale == "stable":
        second = second * (p.site.features_out**0.25 / options.stable_gamma**0.5)
    elif options.scale == "weight_svd":
        second = second * (torch.linalg.matrix_norm(W, 2) / S[columns].max())
    elif options.scale == "gd_scale":
        first, second = first / p.scaling, second / p.scaling
    A.copy_(first)
    B.copy_(second)
    used(p.site, "lora_ga")
    return without(p, W, A, B)


def _backward(model: nn.Module, batches: Iterable[Any]) -> None:
    for batch in batches:
        call(model, batch).loss.backward()


def _chosen(direction: str, r: int) -> tuple[list[int], list[int]]:
    """Which of the 2r directions A and B take."""
    order = list(range(2 * r))
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "random":
        order = torch.randperm(2 * r).tolist()
    first, second = order[:r], order[r:]
    return (second, first) if direction == "A2rBr" else (first, second)


def preprocess_loraga(
    model: nn.Module,
    lora_config: Any,
    train_step: Callable[[], Any],
    cache_file: str | None = None,
    room: float = ROOM,
    show_progress_bar: Shown = False,
) -> None:
    """Find the directions of each linear layer's mean gradient, and leave them on it for the start `lora_ga`.

    Args:
        train_step: runs forward and backward on the untouched model, any number of times. It is called again for other
            layers where the gradients of all take more than `room` bytes.
        cache_file: keep what was found here, and read it from here where the file is; before all is found, what was is in
            a file with `.part` behind its name. show_progress_bar: show how many layers are done; or a function that is
            told (see `Shown`).
    """
    sites = linear_layers(model, lora_config)
    ranks = {path: rank_of(lora_config, path) for path in sites}

    def measure(paths: list[str]) -> Iterator[dict[str, Any]]:
        group = {p: sites[p] for p in paths}
        with _gathering(model, group) as gradients:
            train_step()
        check_all_seen(group, gradients)
        with torch.no_grad():
            found = {p: _directions(s.canonical(gradients.pop(p)).float(), ranks[p]) for p, s in group.items()}
        yield found

    record = Record(cache_file, key_of(sites, start="lora_ga", ranks=ranks))
    groups = turns({p: 4 * shape_of(site.weight).numel() for p, site in sites.items()}, room, True)
    with progress(model, len(sites), "lora_ga: layers", show_progress_bar) as tell:
        found = measured(record, groups, measure, tell)
    for path, site in sites.items():
        keep(site, "lora_ga", tuple(found[path]))


@contextmanager
def _gathering(model: nn.Module, sites: dict[str, Site]) -> Iterator[dict[str, Tensor]]:
    """Until the block ends, add up these weights' gradients as they come, and keep none on the model; then their mean."""
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def adder(path: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            sums[path] = weight.grad.detach().float() + sums.get(path, 0)
            calls[path] = calls.get(path, 0) + 1
            weight.grad = None

        return add

    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
    handles = [s.weight.requires_grad_(True).register_post_accumulate_grad_hook(adder(k)) for k, s in sites.items()]
    try:
        with torch.enable_grad():
            yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag).grad = grad
    for path, count in calls.items():
        sums[path] /= count


def _directions(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient's first 2r directions."""
    q = min(4 * rank, *gradient.shape)
    U, S, V = torch.svd_lowrank(gradient, q=q, niter=4)
    return U[:, : 2 * rank].cpu(), S[: 2 * rank].cpu(), V[:, : 2 * rank].cpu()
