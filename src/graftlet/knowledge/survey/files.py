# SPDX-License-Identifier: Apache-2.0
"""The files of a stranger's repository: so many, so large, none by a link, and Python read as a tree, never run."""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

MOST_FILES = 20_000
MOST_BYTES = 1_000_000
"""Of one file; longer ones are left out, and said to be."""
SKIPPED = {".git", ".hg", ".tox", ".nox", ".venv", "venv", "env", "node_modules", "build", "dist", "site-packages"}
REQUIREMENTS = re.compile(r"(.*[-_.])?requirements([-_.].*)?\.(txt|in)|constraints.*\.txt")
METADATA = {"pyproject.toml", "setup.cfg", "setup.py"}


@dataclass(frozen=True)
class Source:
    """One file: its path from the repository's root, and its text."""

    path: str
    text: str

    @property
    def module(self) -> str:
        """The dotted name that it is imported by, as far as its place tells: `src/` is no part of it."""
        parts = self.path.removesuffix(".py").split("/")
        parts = parts[1:] if parts[0] in ("src", "lib") else parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    @property
    def python(self) -> bool:
        """Whether it is Python."""
        return self.path.endswith(".py")

    def tree(self) -> ast.Module | None:
        """Its tree; None where it is no Python of this version."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def comments(self) -> Iterator[tuple[int, str]]:
        """Its comments, those on lines one below the other as one, with the first line's number."""
        held, begun, last = list[str](), 0, -1
        try:
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
                if token.type != tokenize.COMMENT:
                    continue
                line, alone = token.start[0], not token.line[: token.start[1]].strip()
                if held and line == last + 1 and alone:
                    held.append(token.string)
                else:
                    if held:
                        yield begun, _said(held)
                    held, begun = [token.string], line
                last = line if alone else -1
        except (tokenize.TokenError, SyntaxError, ValueError):
            pass
        if held:
            yield begun, _said(held)


def _said(lines: list[str]) -> str:
    return " ".join(line.lstrip("#!: ").rstrip() for line in lines).strip()


@dataclass(frozen=True)
class Repository:
    """A repository's files, and those that were left out, with the reason."""

    root: Path
    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]


def read(path: str | Path) -> Repository:
    """Read a repository's Python files and packaging metadata.

    Raises `ConfigError` where there is no such folder.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{str(path)!r} is no folder; the root of a Python repository is needed.")
    found, left = list[Source](), list[tuple[str, str]]()
    for file in _files(root):
        name = file.relative_to(root).as_posix()
        if len(found) >= MOST_FILES:
            left.append((name, f"after the first {MOST_FILES:,} files"))
            break
        why = _unreadable(file)
        if why:
            left.append((name, why))
            continue
        try:
            found.append(Source(name, file.read_bytes()[:MOST_BYTES].decode("utf-8-sig")))
        except (OSError, UnicodeDecodeError) as error:
            left.append((name, f"cannot be read: {error}"))
    return Repository(root, tuple(found), tuple(left))


def _files(root: Path) -> Iterator[Path]:
    """What is looked at, in order; links are not followed, neither to files nor to folders."""
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.endswith(".egg-info"))
        for name in sorted(names):
            if name.endswith(".py") or name in METADATA or REQUIREMENTS.fullmatch(name):
                yield Path(folder, name)


def _unreadable(file: Path) -> str:
    if file.is_symlink():
        return "a link"
    if not file.is_file():
        return "no ordinary file"
    size = file.stat().st_size
    return f"{size:,} bytes, more than {MOST_BYTES:,}" if size > MOST_BYTES else ""
