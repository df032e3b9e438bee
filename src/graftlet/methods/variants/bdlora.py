# SPDX-License-Identifier: Apache-2.0
"""BD-LoRA: one factor block-diagonal, so that shards of a layer need no exchange.   dW = s B A,   A or B = diag(D1 ... Dn)

The file holds the blocks below each other: A `[r, in / n]`, or B `[out, r / n]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.init import kaiming_uniform_

from ...config import PeftConfig
from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from . import DeltaWrapper, variant


@dataclass(kw_only=True)
class BdLoraConfig:
    """BD-LoRA.

    Args:
        target_modules_bd_a, target_modules_bd_b: layers whose A, or B, is block-diagonal: those whose path has one of these
            in it. nblocks: how many blocks. match_strict: refuse layers that are in neither list.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        if self.nblocks < 1:
            raise ConfigError(f"BdLoraConfig: nblocks={self.nblocks}; at least 1 is needed.")
        for one in self.target_modules_bd_a or ():
            for other in self.target_modules_bd_b or ():
                if one in other or other in one:
                    raise ConfigError(
                        f"BdLoraConfig: {one!r} of target_modules_bd_a and {other!r} of target_modules_bd_b overlap; only "
                        "one factor of a layer can be block-diagonal."
                    )

    def side(self, key: str) -> str | None:
        """Which factor of a layer is block-diagonal; None for an ordinary pair."""
        sides = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        found = [side for side, names in sides.items() if any(n in key for n in names or ())]
        if len(found) > 1:
            raise ConfigError(f"BdLoraConfig names {key!r} for both factors; only one of them can be block-diagonal.")
        if not found and self.match_strict:
            raise ConfigError(
                f"BdLoraConfig names {key!r} in neither list; add it to target_modules_bd_a or target_modules_bd_b, or "
                "give match_strict=False to adapt it in the ordinary way."
            )
        return found[0] if found else None


@variant("use_bdlora")
class BdLoRA(DeltaWrapper):
    sites = (Linear,)
    starts = ("True", "False", "gaussian")

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        settings = super().settings(site, config, key)
        options: BdLoraConfig = config.use_bdlora  # type: ignore[attr-defined]
        side = options.side(key)
        inner = site.features_in if side == "A" else site.features_out
        if side and (inner % options.nblocks or settings["r"] % options.nblocks):
            raise ConfigError(
                f"BdLoraConfig: nblocks={options.nblocks} must divide r={settings['r']} and the {inner} features of {key!r}."
            )
        return {**settings, "blocked": side}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        specs = self.inner.params(site, p)
        if p.blocked:
            name = f"lora_{p.blocked}.weight"
            rows, columns = specs[name].shape
            specs[name] = Spec((rows, columns // p.use_bdlora.nblocks))
        return specs

    def init(self, p: View) -> Tensor | None:
        rebased = self.inner.init(p)
        if p.blocked == "A" and p.init_lora_weights is True:
            kaiming_uniform_(p.lora_A)  # each output of A has fewer inputs, and starts larger
        return rebased

    def seen(self, p: View) -> View:
        if not p.blocked:
            return p
        name = f"lora_{p.blocked}"
        return p.over({name: torch.block_diag(*self._blocks(p, name))})

    def _blocks(self, p: View, name: str) -> tuple[Tensor, ...]:
        return getattr(p, name).chunk(p.use_bdlora.nblocks)
