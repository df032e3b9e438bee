# SPDX-License-Identifier: Apache-2.0
"""Modules made from a table: a finder for `peft.tuners.lora.layer` and its like, which exist in no file."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Names = Mapping[str, str]
"""What a module serves: each name, and where it is, as `module:name`."""


class Served(MetaPathFinder, Loader):
    """Finds and makes the modules below a package that a table lists."""

    def __init__(self, package: str, places: Mapping[str, Names]) -> None:
        self.package, self.places = package, places
        self.parents = {p[:i] for p in places for i, letter in enumerate(p) if letter == "."} | {""}

    def names(self, module: str) -> Names:
        return self.places.get(self.place(module), {})

    def place(self, module: str) -> str:
        return module.removeprefix(self.package).removeprefix(".")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        place = self.place(fullname)
        if not fullname.startswith(f"{self.package}.") or (place not in self.places and place not in self.parents):
            return None
        return ModuleSpec(fullname, self, origin="graftlet", is_package=place in self.parents)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.furnish(module)

    def furnish(self, module: ModuleType) -> None:
        """Let a module serve its names and its submodules, each when it is first asked for."""
        names = self.names(module.__name__)
        module.__dict__["__getattr__"] = self._getter(module)
        module.__dict__["__all__"] = sorted(n for n in names if not n.startswith("_"))
        module.__dict__["__dir__"] = lambda: sorted({*module.__dict__, *names, *self._below(module.__name__)})

    def _below(self, module: str) -> set[str]:
        place = self.place(module)
        inside = f"{place}." if place else ""
        return {p[len(inside) :].partition(".")[0] for p in self.places if p.startswith(inside) and p != place}

    def _getter(self, module: ModuleType) -> Callable[[str], Any]:
        def get(name: str) -> Any:
            home = self.names(module.__name__).get(name)
            if home is not None:
                owner, _, called = home.partition(":")
                value = functools.reduce(getattr, called.split("."), importlib.import_module(owner))
            elif name in self._below(module.__name__):
                return importlib.import_module(f"{module.__name__}.{name}")
            else:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            module.__dict__[name] = value
            return value

        return get


def begin(package: str, places: Mapping[str, Names]) -> None:
    """Serve a package that is being imported."""
    finder = Served(package, places)
    sys.meta_path.append(finder)
    finder.furnish(sys.modules[package])


def lenient() -> None:
    """Load files as the reference does: what does not fit is warned of, not refused."""
    importlib.import_module("graftlet.limits").STRICT_LOADS = False
