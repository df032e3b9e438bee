# SPDX-License-Identifier: Apache-2.0
"""What was found in a file: a requirement or a piece of lore, with its place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from .files import Source

REQUIREMENTS = {
    "declared": "declared in the packaging metadata",
    "guarded": "imported where it may be missing",
    "sought": "asked for before it is used",
    "checked": "its version is looked at",
}
LORE = {
    "warning": "a warning",
    "logged": "a logged warning",
    "limit": "a limit, raised as an error",
    "switch": "an environment variable that is read",
    "comment": "a comment that defends something",
    "documented": "a docstring that warns",
}
KINDS = {**REQUIREMENTS, **LORE}
LONGEST = 300


@dataclass(frozen=True)
class Finding:
    """kind: one of `KINDS`. symbol: `module:Class.function` around it. package, versions, group: of a requirement."""

    kind: str
    file: str
    line: int
    symbol: str
    text: str
    package: str = ""
    versions: str = ""
    group: str = ""

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def module(self) -> str:
        """The module that it is in."""
        return self.symbol.partition(":")[0]


@dataclass(frozen=True)
class Node:
    """A node of a tree with the names of what is around it, and whether it stands inside a `try` that catches imports."""

    node: ast.AST
    scope: tuple[str, ...]
    guarded: bool = False


def walk(tree: ast.Module) -> Iterator[Node]:
    """All nodes, outer ones first, with their scopes; without recursion, however deep the tree."""
    waiting = [Node(tree, ())]
    while waiting:
        held = waiting.pop()
        yield held
        scope = held.scope
        if isinstance(held.node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope = (*scope, held.node.name)
        elif (named := assigned(held.node)) and not scope:
            scope = (named,)
        node, guards = held.node, set[ast.AST]()
        if isinstance(node, ast.Try) and any(map(_catches, node.handlers)):
            guards = set(node.body)
        children = [Node(c, scope, held.guarded or c in guards) for c in ast.iter_child_nodes(node)]
        waiting += reversed(children)


def assigned(node: ast.AST) -> str:
    """The one name that a statement gives a value to."""
    target = (
        node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    )
    return target.id if isinstance(target, ast.Name) else ""


def _catches(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {last(k) for k in kinds if k is not None}
    return handler.type is None or bool(names & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def last(node: ast.AST | None) -> str:
    """The last name of `a.b.c`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def found(source: Source, kind: str, held: Node | None, line: int, text: str, **more: str) -> Finding:
    """A finding at a node, or at a line of a file that is no Python."""
    scope = ".".join(held.scope) if held is not None else ""
    symbol = f"{source.module}:{scope}" if source.python else source.path
    said = " ".join(text.split())
    return Finding(kind, source.path, line, symbol, said if len(said) <= LONGEST else f"{said[:LONGEST]}...", **more)


def words_of(node: ast.AST | None) -> str:
    """The text of a string, its parts that are computed as `{...}`; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(v) if isinstance(v, ast.Constant) else "{...}" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        return words_of(node.left) + (words_of(node.right) if isinstance(node.op, ast.Add) else "")
    if isinstance(node, ast.Call) and last(node.func) == "format" and isinstance(node.func, ast.Attribute):
        return words_of(node.func.value)
    return ""
