# SPDX-License-Identifier: Apache-2.0
"""LN tuning: the normalisation layers trained whole (arXiv 2312.11420).   W' = a trained copy of W

A copy of each target stands beside the frozen original; any module can be one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Excludes, PeftConfig, Saves, Targets
from ..core.method import Replace
from ..registry import method


@dataclass(kw_only=True)
class LNTuningConfig(Targets, Excludes, Saves, PeftConfig):
    """LN tuning. It has no settings of its own: the targets are trained whole."""


@method("ln_tuning", LNTuningConfig)
class LNTuning(Replace):
    copies, original = "ln_tuning_layers", "base_layer"
