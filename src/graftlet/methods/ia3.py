# SPDX-License-Identifier: Apache-2.0
"""IA3: learned scaling of activations (arXiv 2205.05638).   W' = diag(l) W, b' = l b;  feedforward: W' = W diag(l)

l is `[out, 1]` on what a layer gives, `[1, in]` on what a feedforward layer takes, `[1, channels, 1, ...]` on a
convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import Excludes, FanInFanOut, Names, PeftConfig, Saves, Targets
from ..core.method import Method, OutputMap, Spec, Stage, View, Weights
from ..core.target import matches, model_type
from ..errors import ConfigError, nearest
from ..registry import default_targets, method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site
from .parts.gained import gained


@dataclass(kw_only=True)
class IA3Config(Targets, Excludes, Saves, FanInFanOut, PeftConfig):
    """IA3.

    Args:
        feedforward_modules: the layers whose input is scaled instead of their output: names, as in target_modules, of
            which they must be a part. None takes the default of the model's type.
        init_ia3_weights: True (ones: no change at first) or False (random).
    """

    unites: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules")

    feedforward_modules: Names | None = None
    init_ia3_weights: bool = True

    def check(self) -> None:
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            extra = sorted(self.feedforward_modules - self.target_modules)
            self.require(
                not extra, f"`feedforward_modules` should be a subset of `target_modules`; {extra} is not in it."
            )


@method("ia3", IA3Config, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class IA3(OutputMap):
    additive = True

    def complete(self, config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(config, IA3Config)
        if config.feedforward_modules is None:
            table, kind = default_targets("IA3.feedforward"), str(model_type(model))
            if kind not in table:
                raise ConfigError(
                    f"IA3Config.feedforward_modules is not given, and there is no default for model_type={kind!r}"
                    f"{nearest(kind, table)} Name the layers whose input is scaled, or give [] for none."
                )
            config.feedforward_modules = set(table[kind])

    def pick(self, site: Site, config: PeftConfig, key: str) -> Method:
        assert isinstance(config, IA3Config)
        return Feedforward() if matches(key, config.feedforward_modules) else self

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        out = site.features_out
        return {"ia3_l": Spec((1, out, *[1] * len(site.kernel)) if site.kernel else (out, 1))}

    def init(self, p: View) -> None:
        if p.init_ia3_weights:
            p.ia3_l.fill_(1)
        else:
            p.ia3_l.normal_()

    def map(self, p: View, y: Tensor) -> Tensor:
        return y * p.ia3_l.flatten()

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(p, x, before)
        return p.site.on_channels(lambda y: gained(y, p.ia3_l.flatten(), None), before(x))

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        if p.site.stack:
            return super().back(p, like)
        return lambda W: p.site.on_out(lambda v: v / p.ia3_l.flatten(), W)


class Feedforward(IA3):
    """The same on the input side."""

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        if isinstance(site, Embedding):
            raise ConfigError(
                f"feedforward_modules has {p.key!r}, an embedding, whose input is no activation to scale; leave it out."
            )
        return {"ia3_l": Spec((1, site.features_in, *[1] * len(site.kernel)))}

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        return self._scaled(p, W, p.ia3_l), b

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        if p.site.stack:
            return lambda W: W / self.unstacked("ia3_l", p.ia3_l, p.site.stack)
        return lambda W: self._scaled(p, W, 1 / p.ia3_l)

    def _scaled(self, p: View, W: Tensor, by: Tensor) -> Tensor:
        groups = p.site.groups  # a group's outputs see their own share of the inputs
        scale = by.reshape(groups, 1, -1, *[1] * len(p.site.kernel))
        return (W.unflatten(0, (groups, -1)) * scale).flatten(0, 1)

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        return before(p.site.on_channels(lambda v: self.map(p, p.cast(v)).to(v.dtype), x))
