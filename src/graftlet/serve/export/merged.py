# SPDX-License-Identifier: Apache-2.0
"""The whole model with the adapter in its weights: what every engine loads, and all that some adapters can be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from .target import Exported, Target, known


def write(model: nn.Module, adapter: str, out: Path) -> Exported:
    """Merge a copy of a model and save it. `graftlet merge` does the same shard by shard, in the memory of one."""
    merged: Any = copy.deepcopy(model)
    merged = merged.merge_and_unload(safe_merge=True, adapter_names=[adapter])
    merged.save_pretrained(out)
    return Exported(sorted(p for p in out.iterdir() if p.is_file()), f"AutoModel.from_pretrained({str(out)!r})")


known["merged"] = Target("merged", "The base with the adapter merged into its weights.", whole=write)
