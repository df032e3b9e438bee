# SPDX-License-Identifier: Apache-2.0
"""What a repository's people have learnt: warnings, limits raised as errors, comments and docstrings that defend something."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from .files import Source
from .findings import Finding, Node, assigned, found, last, walk, words_of

DEFENDS = re.compile(
    r"\b(work[- ]?arounds?|bugs?|buggy|hack|must|do not|don'?t|does not|never|because|since|otherwise|beware|careful|for|"
    r"cannot|can'?t|fails?|breaks?|lose|lost|would|may|unless|only|needs?|no longer|older|not|too|still|wrong|so that|as)\b",
    re.IGNORECASE,
)
"""Words of a comment that says why something is as it is."""
WARNS = re.compile(
    r"\b(must|never|cannot|do(?:es)? not|only|unless|beware|refused?|raises?|not|without|needs?|older|instead|in place of|"
    r"rather than|would|costs?|alone|loses?|lost|wrong|at once|random)\b",
    re.IGNORECASE,
)
"""Words of a docstring's sentence that warns."""
WARNED = {"warn", "warn_explicit", "warn_once", "warning_once"}
LOGGED = {"warning", "warning_once", "warning_advice"}
PRAGMAS = re.compile(r"(noqa|type:|pragma|pyright:|pylint:|ruff:|mypy:|SPDX|fmt:|!|-\*-|\W*$)")
SHORTEST = 12


def lore(source: Source) -> Iterator[Finding]:
    """The lore of one Python file."""
    if not source.python or (tree := source.tree()) is None:
        return
    scopes = list[tuple[int, int, Node]]()
    for held in walk(tree):
        node = held.node
        if isinstance(node, ast.Raise):
            yield from _limit(source, held, node)
        elif isinstance(node, ast.Call):
            yield from _warning(source, held, node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            yield from _documented(source, held, node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            inner = Node(node, (*held.scope, node.name))
            scopes.append((first, node.end_lineno or node.lineno, inner))
        elif isinstance(node, ast.stmt) and not isinstance(node, ast.Expr) and not held.scope:
            scopes.append((node.lineno, node.end_lineno or node.lineno, _named(node)))
    yield from _comments(source, scopes)
    yield from _strings_below(source, tree)


def _named(node: ast.stmt) -> Node:
    name = assigned(node)
    return Node(node, (name,) if name else ())


def _limit(source: Source, held: Node, node: ast.Raise) -> Iterator[Finding]:
    """`raise X(message)`. What is raised again as it is, or without a word, is no limit."""
    if isinstance(node.exc, ast.Call):
        said = next((w for a in [*node.exc.args, *(k.value for k in node.exc.keywords)] if (w := words_of(a))), "")
        if said:
            yield found(source, "limit", held, node.lineno, f"{last(node.exc.func)}: {said}")


def _warning(source: Source, held: Node, node: ast.Call) -> Iterator[Finding]:
    called = last(node.func)
    said = next((w for a in [*node.args, *(k.value for k in node.keywords)] if (w := words_of(a))), "")
    if called in WARNED and said:
        yield found(source, "warning", held, node.lineno, said)
    elif called == "getenv" or (called == "get" and last(getattr(node.func, "value", None)) == "environ"):
        yield found(source, "switch", held, node.lineno, f"reads {ast.unparse(node)}")
    elif called in LOGGED and isinstance(node.func, ast.Attribute) and said:
        yield found(source, "logged", held, node.lineno, said)


def _documented(source: Source, held: Node, node: ast.AST) -> Iterator[Finding]:
    text = (
        ast.get_docstring(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))
        else None
    )
    if not text:
        return
    name = getattr(node, "name", "")
    inner = Node(node, (*held.scope, name) if name else held.scope)
    for sentence in sentences(text):
        if WARNS.search(sentence):
            yield found(source, "documented", inner, getattr(node, "lineno", 1), sentence)


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    whole = " ".join(text.split())
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", whole) if len(s.strip()) >= SHORTEST]


def _comments(source: Source, scopes: list[tuple[int, int, Node]]) -> Iterator[Finding]:
    for line, text in source.comments():
        if len(text) >= SHORTEST and not PRAGMAS.match(text) and DEFENDS.search(text):
            inside = [s for s in scopes if s[0] <= line <= s[1]]
            around = max(inside, key=lambda s: (s[0], -s[1]), default=None)
            yield found(source, "comment", around[2] if around else None, line, text)


def _strings_below(source: Source, tree: ast.Module) -> Iterator[Finding]:
    """A string below an assignment says what the name is for, in a module and in a class."""
    bodies = [((), tree.body)] + [((c.name,), c.body) for c in tree.body if isinstance(c, ast.ClassDef)]
    for scope, body in bodies:
        for before, node in itertools.pairwise(body):
            text = words_of(node.value) if isinstance(node, ast.Expr) else ""
            held = Node(node, (*scope, *_named(before).scope))
            if text and len(held.scope) > len(scope):
                for sentence in sentences(text):
                    if WARNS.search(sentence):
                        yield found(source, "documented", held, node.lineno, sentence)
