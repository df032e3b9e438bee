# SPDX-License-Identifier: Apache-2.0
"""What a repository needs: what its metadata declares, and what its code imports with care, asks for, or compares."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from typing import Any

from .files import Source
from .findings import Finding, Node, found, last, walk, words_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ASKED = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;#)]*)\)?(?:;([^#]*))?")
_VERSION = re.compile(r"v?\d+(\.\d+)+[\w.+!-]*")
SEEKING = {"find_spec", "is_installed", "_is_package_available", "is_available", "importorskip"}
VERSIONS = {"version", "parse", "Version", "LooseVersion", "check_version", "require_version", "is_torch_version"}


def requirements(source: Source) -> Iterator[Finding]:
    """The requirements that one file tells."""
    name = source.path.rpartition("/")[2]
    if name == "pyproject.toml":
        yield from _pyproject(source)
    elif name == "setup.cfg":
        yield from _setup_cfg(source)
    elif not source.python:
        yield from _lines(source)
    elif (tree := source.tree()) is not None:
        yield from _code(source, tree)


def _declared(source: Source, asked: Any, group: str, near: int = 0) -> Iterator[Finding]:
    """One requirement as it is written: `torch>=2.6; python_version < "3.12"`."""
    if not isinstance(asked, str) or not (parts := _ASKED.match(asked)):
        return
    versions = (parts[2] or "").strip()
    line = near or _line_of(source.text, asked)
    yield found(source, "declared", None, line, asked, package=parts[1], versions=versions, group=group)


def _line_of(text: str, words: str) -> int:
    at = text.find(words)
    return text.count("\n", 0, at) + 1 if at >= 0 else 1


def _pyproject(source: Source) -> Iterator[Finding]:
    try:
        values = tomllib.loads(source.text)
    except (ValueError, RecursionError):
        return
    project = _table(values, "project")
    if isinstance(python := project.get("requires-python"), str):
        yield from _declared(source, f"python {python}", "", _line_of(source.text, "requires-python"))
    groups = {
        "": project.get("dependencies"),
        **_table(project, "optional-dependencies"),
        **_table(values, "dependency-groups"),
        "build": _table(values, "build-system").get("requires"),
    }
    for group, asked in groups.items():
        for one in asked if isinstance(asked, list) else ():
            yield from _declared(source, one, group)
    poetry = _table(_table(values, "tool"), "poetry")
    for package, versions in _table(poetry, "dependencies").items():
        wanted = versions.get("version", "") if isinstance(versions, dict) else versions
        yield from _declared(source, f"{package} {wanted}", "", _line_of(source.text, package))


def _table(values: Any, name: str) -> dict[str, Any]:
    held = values.get(name) if isinstance(values, dict) else None
    return held if isinstance(held, dict) else {}


def _setup_cfg(source: Source) -> Iterator[Finding]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(source.text)
    except configparser.Error:
        return
    wanted = {"": parser.get("options", "install_requires", fallback="")}
    if parser.has_section("options.extras_require"):
        wanted |= dict(parser.items("options.extras_require"))
    for group, text in wanted.items():
        for one in text.splitlines():
            yield from _declared(source, one.strip(), group)


def _lines(source: Source) -> Iterator[Finding]:
    name = source.path.rpartition("/")[2]
    group = name.rpartition(".")[0].replace("requirements", "").strip("-_.")
    for number, line in enumerate(source.text.splitlines(), 1):
        asked = line.partition(" #")[0].strip()
        if asked and not asked.startswith(("#", "-")):
            yield from _declared(source, asked, group, number)


# code


def _code(source: Source, tree: ast.Module) -> Iterator[Finding]:
    setup = source.path.rpartition("/")[2] == "setup.py"
    for held in walk(tree):
        node = held.node
        if isinstance(node, (ast.Import, ast.ImportFrom)) and held.guarded:
            yield from _guarded(source, held, node)
        elif isinstance(node, ast.Call):
            yield from _setup_call(source, node) if setup and last(node.func) == "setup" else _call(source, held, node)
        elif isinstance(node, ast.Compare):
            yield from _compared(source, held, node)


def _guarded(source: Source, held: Node, node: ast.Import | ast.ImportFrom) -> Iterator[Finding]:
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    if isinstance(node, ast.ImportFrom) and node.level:
        return
    for name in names:
        top = name.partition(".")[0]
        if top and top not in sys.stdlib_module_names and top != source.module.partition(".")[0]:
            yield found(source, "guarded", held, node.lineno, f"import {name}", package=top)


def _call(source: Source, held: Node, node: ast.Call) -> Iterator[Finding]:
    """`find_spec("x")`, `version("x")`, and tables of requirements: a call with a package's name and its versions."""
    words = [w for a in [*node.args, *(k.value for k in node.keywords)] if (w := words_of(a))]
    called = last(node.func)
    if not words or not re.fullmatch(r"[A-Za-z][\w.-]*", words[0]):
        return
    name = words[0].partition(".")[0]
    wanted = next((w for w in words[1:] if _VERSION.search(w) and len(w) < 40), "")
    if called in SEEKING or re.fullmatch(r"is_\w+_available", called):
        yield found(source, "sought", held, node.lineno, f'{called}("{words[0]}")', package=name, versions=wanted)
    elif wanted and ("requirement" in called.lower() or called in VERSIONS or called.startswith("need")):
        yield found(source, "checked", held, node.lineno, ast.unparse(node), package=name, versions=wanted)
    elif called == "version" and isinstance(node.func, ast.Attribute):
        yield found(source, "checked", held, node.lineno, ast.unparse(node), package=name)


def _compared(source: Source, held: Node, node: ast.Compare) -> Iterator[Finding]:
    """`parse(torch.__version__) >= parse("2.6")`, and what is like it."""
    said = ast.unparse(node)[:200]
    owner = re.search(r"\b(\w+)(?:\.\w+)*\.(?:__version__|version_info|version)\b", said)
    if (
        owner is None
        or not re.search(r"\d", said)
        or not isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq))
    ):
        return
    package = "python" if owner[1] == "sys" else owner[1]
    version = _VERSION.search(said)
    yield found(source, "checked", held, node.lineno, said, package=package, versions=version[0] if version else "")


def _setup_call(source: Source, node: ast.Call) -> Iterator[Finding]:
    """`setup(install_requires=[...], extras_require={...})`, as far as it is written out."""
    given: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg in ("install_requires", "extras_require", "python_requires"):
            try:
                given[keyword.arg] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    groups = {"": given.get("install_requires"), **_table(given, "extras_require")}
    for group, asked in groups.items():
        for one in asked if isinstance(asked, (list, tuple)) else ():
            yield from _declared(source, one, str(group), node.lineno)
    if isinstance(python := given.get("python_requires"), str):
        yield from _declared(source, f"python {python}", "", node.lineno)
