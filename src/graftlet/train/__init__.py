# SPDX-License-Identifier: Apache-2.0
"""Training: recipes over the transformers Trainer, and the callbacks they use.

from graftlet.train import load_recipe, train
result = train(load_recipe("examples/recipes/sms-spam.toml", ["output=runs/a"]))
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "recipe": "Recipe load_recipe",
    "run": "Result train",
    "callbacks": "Allocation RichProgress StopOnSignal",
    "trainer": "AdapterTrainer",
    "checkpoints": "AdapterCheckpoints",
    "batches": "Collator check_isolation pack",
    "tokens": "Encoder",
}
_home = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_home)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module 'graftlet.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_home[name]}", __name__), name)
    globals()[name] = value
    return value
