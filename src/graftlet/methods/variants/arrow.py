# SPDX-License-Identifier: Apache-2.0
"""Arrow."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError


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
