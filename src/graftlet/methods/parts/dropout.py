# SPDX-License-Identifier: Apache-2.0
"""Dropout on what goes into an adapter."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import ConfigError
from ...weights.site import Site


def check_dropout(site: Site, key: str, name: str, rate: float) -> None:
    """Raise `ConfigError` where there is no input to drop from: the layer is adapted through its weight."""
    if site.opaque and rate:
        raise ConfigError(f"{name}={rate} cannot work on {key!r}, which is adapted through its weight; use 0.")


class InputDropout(nn.Dropout):
    """Dropout on what goes into an adapter; indices to look up pass as they are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.is_floating_point() else input


def input_dropout(site: Site, key: str, name: str, rate: float) -> nn.Module:
    """Dropout on a layer's input, or the identity for rate 0. Raises as `check_dropout` does."""
    check_dropout(site, key, name, rate)
    return InputDropout(rate) if rate else nn.Identity()
