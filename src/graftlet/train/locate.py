# SPDX-License-Identifier: Apache-2.0
"""Where a key stands in a TOML file: the standard parser forgets line numbers, and an error message needs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Path = tuple[str | int, ...]
"""The way to a value: table names, keys, and indices into arrays."""

_HEADER = re.compile(r"^\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(?:#.*)?$")


def parse(text: str) -> dict[str, Any]:
    """The tables of a TOML text; `ValueError`, with line and column, where it is none."""
    return tomllib.loads(text)


def parse_value(text: str) -> Any:
    """The TOML value that a text stands for; a text that is none is itself: `lora`, `runs/a`."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, on which each key and each table of a valid TOML text begins."""
    lines, found, counts = text.splitlines(), {}, {}
    table: Path = ()
    row = 0
    while row < len(lines):
        header = _HEADER.match(lines[row])
        if header:
            table = _enter(header, counts)
            found.setdefault(table, row + 1)
            row += 1
            continue
        values, size = _statement(lines, row)
        for path in _paths(values):
            found.setdefault((*table, *path), row + 1)
        row += size
    return found


def line_of(found: dict[Path, int], path: Path) -> int | None:
    """The line of a path, or of the nearest table around it that has one."""
    return next((found[path[:n]] for n in range(len(path), 0, -1) if path[:n] in found), None)


def _enter(header: re.Match[str], counts: dict[Path, int]) -> Path:
    names = next(iter(_paths(tomllib.loads(f"{header[2]}.end = 0"), leaves=True)))[:-1]
    path: Path = ()
    for name in names:  # a parent that is an array of tables stands for its last element
        path = (*path, name)
        if path in counts and path != names:
            path = (*path, counts[path])
    if header[1] == "[[":
        counts[path] = counts.get(path, -1) + 1
        path = (*path, counts[path])
    return path


def _statement(lines: list[str], row: int) -> tuple[dict[str, Any], int]:
    """The assignment that begins on a row, parsed, and how many rows it takes: arrays and strings may run on."""
    for size in range(1, len(lines) - row + 1):
        try:
            return tomllib.loads("\n".join(lines[row : row + size])), size
        except ValueError:
            continue
    return {}, 1


def _paths(values: Any, leaves: bool = False) -> Iterator[Path]:
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        if not leaves or not isinstance(value, dict):
            yield (key,)
        for path in _paths(value, leaves):
            yield (key, *path)
