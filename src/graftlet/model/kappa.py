# SPDX-License-Identifier: Apache-2.0
"""KappaTune: adapt the layers whose weights are best conditioned (arXiv 2506.16289).   kappa = s_max / s_min

A weight of small condition number uses all its directions alike, so a low-rank change disturbs what it knows least.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.target import walk
from ..errors import ConfigError
from ..weights.site import Linear, site_of
from ..weights.whole import shape_of, whole

STACKS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""What stacks of experts are called."""
TINY = 1e-8


class KappaTuneSelector:
    """Condition numbers of a model's linear layers and stacks of experts, found once, as they are first asked for.

    Args:
        model: the base model, its weights plain or quantised. max_dim_size_to_analyze: larger weights are passed over.
        moe_param_suffixes: what the stacks of experts' names end in. show_progress: show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or STACKS
        self.show_progress = show_progress
        self._found: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Linear layers by path, the best conditioned first: so many, or this share (one at least), or up to a kappa."""
        return _best(self._kappas()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same for stacks of experts, whose kappa is the mean of the experts'."""
        return _best(self._kappas()[1], top_p, num_modules, threshold)

    def _kappas(self) -> tuple[dict[str, float], dict[str, float]]:
        if self._found is None:
            layers, stacks = dict(self._layers()), dict(self._stacks())
            self._found = self._measured(layers.items(), "layers"), self._measured(stacks.items(), "stacks of experts")
        return self._found

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for place in walk(self.model):
            site = site_of(place.bare)
            if type(site) is Linear and max(site.shape) <= self.max_dim_size_to_analyze:
                yield place.path, lambda site=site: site.read()[0][None]

    def _stacks(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.model.named_parameters():
            stacked = len(shape := shape_of(parameter)) == 3 and name.endswith(self.moe_param_suffixes)
            if stacked and max(shape[1:]) <= self.max_dim_size_to_analyze:
                yield name, lambda parameter=parameter: whole(parameter)

    @torch.no_grad()
    def _measured(self, weights: Iterable[tuple[str, Any]], what: str) -> dict[str, float]:
        weights = list(weights)
        if self.show_progress and weights:
            from tqdm.auto import tqdm

            weights = tqdm(weights, desc=f"condition numbers of {what}")
        return {name: kappa(read()) for name, read in weights}


def kappa(stack: Tensor) -> float:
    """The mean condition number of a stack of matrices `[n, rows, columns]`, one at a time."""
    values = [torch.linalg.svdvals(W.float()) for W in stack]
    return sum(float(S[0] / (S[-1] + TINY)) for S in values) / len(values)


def _best(found: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p!r}; allowed: over 0, and at most 1.")
    names = sorted(found, key=lambda name: found[name])
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return [n for n in names if threshold is None or found[n] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` for a config: the share `top_p` that is best conditioned.

    Arguments: `KappaTuneSelector`. `target_parameters` is None where the model has no stack of experts.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": parameters or None}
