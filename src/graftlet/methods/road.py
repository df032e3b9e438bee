# SPDX-License-Identifier: Apache-2.0
"""RoAd: 2-D rotary adaptation (arXiv 2409.00119).   W' = R W, b' = R b

R turns each pair (i, i + g/2) of outputs within every group of g, and stretches it:

    yi' = a0 cos(t0) yi - a2 sin(t2) yj,     yj' = a3 sin(t3) yi + a1 cos(t1) yj

`road_1` has one angle t and one length a for all four, `road_2` one for each row, `road_4` four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import PeftConfig, Saves, Targets
from ..core.method import OutputMap, Spec, View
from ..errors import ConfigError
from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter, Site

RoadVariant = Literal["road_1", "road_2", "road_4"]

WHICH = {"road_1": (0, 0, 0, 0), "road_2": (0, 1, 0, 1), "road_4": (0, 1, 2, 3)}
"""Which of a pair's own (t, a) the cosines of i and j and the sines of i and j take."""


@dataclass(kw_only=True)
class RoadConfig(Targets, Saves, PeftConfig):
    """RoAd.

    Args:
        variant: "road_1", "road_2" or "road_4": how many angles and lengths a pair has.
        group_size: pairs are made within groups of this many outputs, an even number that divides a layer's outputs.
        init_weights: True (no rotation at first) or False (random).
    """

    variant: RoadVariant = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def check(self) -> None:
        even = self.group_size > 0 and self.group_size % 2 == 0
        self.require(even, f"group_size={self.group_size}; a positive even number is needed, to make pairs.")


@method("road", RoadConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter))
class RoAd(OutputMap):
    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, RoadConfig)
        out, g = (
            site.features_out // site.groups,
            config.group_size,
        )  # a pair must not reach across a convolution's groups
        if out % g:
            raise ConfigError(
                f"RoadConfig.group_size={g} does not divide the {out} outputs of {key!r}; give an even divisor of it."
            )
        return {"variant": config.variant, "group_size": g}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        size = site.features_out // 2 * int(p.variant[-1])
        return {"road_theta": Spec((size,)), "road_alpha": Spec((size,))}

    def init(self, p: View) -> None:
        if p.init_weights:
            p.road_theta.zero_()
            p.road_alpha.fill_(1)
        else:
            p.road_theta.normal_(0, 0.5)
            p.road_alpha.normal_(1, 0.5)

    def map(self, p: View, y: Tensor) -> Tensor:
        cos_i, cos_j, sin_i, sin_j = coefficients(p)
        yi, yj = y.unflatten(-1, (-1, 2, p.group_size // 2)).unbind(-2)
        turned = (cos_i * yi - sin_i * yj, sin_j * yi + cos_j * yj)
        return torch.stack(turned, -2).flatten(-3)

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        if p.site.stack:
            return super().back(p, like)
        cos_i, cos_j, sin_i, sin_j = coefficients(p)
        area = cos_i * cos_j + sin_i * sin_j

        def turned_back(y: Tensor) -> Tensor:
            yi, yj = y.unflatten(-1, (-1, 2, p.group_size // 2)).unbind(-2)
            found = (cos_j * yi + sin_i * yj) / area, (cos_i * yj - sin_j * yi) / area
            return torch.stack(found, -2).flatten(-3)

        return lambda W: p.site.on_out(turned_back, W)


def coefficients(p: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a cos t for i and for j, a sin t for i and for j: each `[groups, group_size / 2]`."""
    shape = (-1, int(p.variant[-1]), p.group_size // 2)
    theta, alpha = p.road_theta.reshape(shape), p.road_alpha.reshape(shape)
    cos, sin = (alpha * theta.cos()).unbind(1), (alpha * theta.sin()).unbind(1)
    a, b, c, d = WHICH[p.variant]
    return cos[a], cos[b], sin[c], sin[d]
