# SPDX-License-Identifier: Apache-2.0
"""A page of what is known: the data that the docs, the command line and the checks are made from.

A page is a frozen dataclass in a Python file: what it claims stands beside the function that checks it, and types are checked
as any others are. A link is written on one of its two pages; both show it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..errors import ConfigError

KINDS = {
    "code": "Codes",
    "environment": "Environments",
    "heuristic": "Heuristics",
    "workflow": "Workflows",
    "principle": "Principles",
    "implementation": "Implementations",
}
"""Each kind of page, and what its index is called."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """name: unique among all pages, of all kinds. text: Markdown. links: names of other pages. evidence: symbols,
    `module:name`, that show what the page says."""

    kind: ClassVar[str] = ""
    name: str
    title: str
    text: str = ""
    links: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()

    def sections(self) -> dict[str, str]:
        """The page's Markdown by heading, beside its text; a kind of page says more."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Workflow(Page):
    """Something that a user does, step by step. source: its Markdown file in `docs/`."""

    kind = "workflow"
    source: str


@dataclass(frozen=True, kw_only=True)
class Implementation(Page):
    """A module or package whose docstrings are its text. modules: those that stand on the page."""

    kind = "implementation"
    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Principle(Page):
    """A family of methods: what they have in common. family: the name of the base class, as the registry has it."""

    kind = "principle"
    family: str

    def sections(self) -> dict[str, str]:
        from .tables import family_markdown

        return {"Methods": family_markdown(self.family)}


@dataclass(frozen=True)
class Place:
    """Where a symbol stands: a file, from the folder that holds the package, and the line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def locate(symbol: str) -> Place:
    """Where `module:name` or `module:Class.name` is defined; nothing is imported but the packages above it.

    Raises `ConfigError` where there is no such module or name.
    """
    module, _, name = symbol.partition(":")
    path = _file(module)
    body, found = _parsed(path).body, 1
    for part in name.split(".") if name else []:
        node = next((n for n in body if part in _defines(n)), None)
        if node is None:
            raise ConfigError(f"{symbol!r}: {path} defines no {name!r}.")
        found, body = node.lineno, getattr(node, "body", [])
    root = Path(__file__).parents[2]
    return Place(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name, found)


def _file(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or not spec.origin:
        raise ConfigError(f"there is no module {module!r}.")
    return Path(spec.origin)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()
