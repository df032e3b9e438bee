# SPDX-License-Identifier: Apache-2.0
"""Models with adapters in the hands of others: Trainers that do not know them, and engines on several devices."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"train.checkpoints": "AdapterCheckpoints", "integrations.sharding": "sent shard"}
_home = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_home)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module 'graftlet.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"..{_home[name]}", __name__), name)
    globals()[name] = value
    return value
