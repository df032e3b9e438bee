# SPDX-License-Identifier: Apache-2.0
"""Public names at a place of their own, resolved on first use: importing the place imports nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def placed(place: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of the module `place`; `homes` has each module's names, space-separated."""
    home = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {place!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"graftlet.{home[name]}"), name)
        setattr(sys.modules[place], name, value)
        return value

    return get, lambda: sorted(home), sorted(home)
