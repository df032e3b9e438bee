# SPDX-License-Identifier: Apache-2.0
"""What the package's own source says: where errors are raised and warnings given."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from .page import Place

ROOT = Path(__file__).parents[1]


@functools.cache
def givings() -> tuple[tuple[str, Place], ...]:
    """Each `raise X(...)` and `warn(X, ...)` of the package: X's name, and where."""
    return tuple(given for path in sorted(ROOT.rglob("*.py")) for given in _in_file(path))


def _in_file(path: Path) -> Iterator[tuple[str, Place]]:
    file = path.relative_to(ROOT.parent).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if (name := _given(node)) is not None:
            yield name, Place(file, getattr(node, "lineno", 1))


def _given(node: ast.AST) -> str | None:
    if isinstance(node, ast.Raise) and node.exc is not None:
        made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return _last(made)
    if isinstance(node, ast.Call) and _last(node.func) == "warn" and node.args:
        return _last(node.args[0])
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
        name = _last(node.value.func)  # a function that makes an error for others to raise
        return name if name and name.endswith("Error") else None
    return None


def _last(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
