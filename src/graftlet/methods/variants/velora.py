# SPDX-License-Identifier: Apache-2.0
"""VeLoRA: activations kept for the gradient as one number a group (arXiv 2405.17991).   x ~ scale (x v) v^T, group by group

The forward is LoRA's. For the gradient of A, each group of the input's features is projected on a unit vector v, kept as
that one number, and spread along v again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from . import DeltaWrapper, variant

INITS = ("batch_average", "batch_average_once", "random")


@dataclass(kw_only=True)
class VeloraConfig:
    """VeLoRA.

    Args:
        num_groups: into how many groups the features are split: more are more exact, and take more memory.
        scale: what the restored activations are multiplied by.
        init_type: where v comes from: "batch_average", each batch's mean; "batch_average_once", the first's; "random".
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        if self.num_groups <= 0:
            raise ConfigError(f"VeloraConfig: num_groups={self.num_groups}; a positive number is needed.")
        if self.init_type not in INITS:
            raise ConfigError(f"VeloraConfig: init_type={self.init_type!r}; allowed: {', '.join(INITS)}.")


@variant("velora_config")
class VeLoRA(DeltaWrapper):
    sites = (Linear,)

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        width = -(-site.features_in // p.velora_config.num_groups)
        return {**self.inner.params(site, p), "lora_velora_embed": Spec((width,), trainable=False)}
