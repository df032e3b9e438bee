# SPDX-License-Identifier: Apache-2.0
"""QA-LoRA: adapters of pooled inputs (arXiv 2309.14717).   dW = s B A P,   P = n/g (1 over the g inputs of each of n groups)

The change is the same all over a group of inputs. A base that is quantised in such groups, each with a zero that may be any
number (HQQ), takes it into its zeros: it is merged and quantised at once, and nothing is rounded anew.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...config import PeftConfig
from ...core.method import Spec, View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from . import DeltaWrapper, variant


@variant("use_qalora")
class QALoRA(DeltaWrapper):
    sites = (Linear,)
    starts = ("True", "False", "gaussian")

    @classmethod
    def checks(cls, config: Any) -> None:
        if config.qalora_group_size < 1:
            raise ConfigError(f"LoraConfig: qalora_group_size={config.qalora_group_size}; at least 1 is needed.")

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        size: int = config.qalora_group_size  # type: ignore[attr-defined]
        settings = super().settings(site, config, key)
        if site.features_in % size:
            raise ConfigError(
                f"qalora_group_size={size} must divide the {site.features_in} inputs of {key!r}; take the size of the "
                "groups that the base is quantised in, or a divisor of it."
            )
        return settings

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        specs = self.inner.params(site, p)
        specs["lora_A.weight"] = Spec((p.r, site.features_in // p.qalora_group_size))
        return specs

    def seen(self, p: View) -> View:
        size = p.qalora_group_size
        return p.over({"lora_A": (p.lora_A * (p.lora_A.shape[1] / size)).repeat_interleave(size, 1)})

    def update(self, p: View, x: Tensor) -> Tensor:
        pooled = x.unflatten(-1, (-1, p.qalora_group_size)).mean(-1)
        return self.inner.update(p, pooled * pooled.shape[-1])
