# SPDX-License-Identifier: Apache-2.0
"""`survey`: a repository read, and what was found in it written as pages that a person goes on with."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, listing
from ...files import write_atomically
from .files import Source, read
from .findings import Finding
from .lore import lore
from .pages import FORMATS, Draft, drafts, index
from .requirements import requirements

INDEX = "index"
MARK = "survey "
"""What the last line begins with, before the digest of all above it: so a page that was edited is known."""


@dataclass(frozen=True)
class Survey:
    """What was found, as pages, and the files that were left out with the reason."""

    findings: tuple[Finding, ...]
    pages: tuple[Draft, ...]
    left_out: tuple[tuple[str, str], ...]

    def count(self) -> Counter[str]:
        """How many findings there are of each kind."""
        return Counter(f.kind for f in self.findings)

    def about(self, symbol: str) -> tuple[Finding, ...]:
        """What was found in `module:Class.function`, or inside it; of a name alone, in the whole module."""
        module, _, name = symbol.partition(":")
        inside = (f for f in self.findings if f.module == module)
        if not name:
            return tuple(inside)
        return tuple(f for f in inside if f"{f.symbol.partition(':')[2]}.".startswith(f"{name}."))


@dataclass(frozen=True)
class Written:
    """What became of the pages: written, as they were, or kept since somebody edited them."""

    written: tuple[str, ...]
    same: tuple[str, ...]
    kept: tuple[str, ...]


def survey(path: str | Path) -> Survey:
    """Read a repository: what it needs and what its lore is. Nothing of it is imported or run.

    Raises `ConfigError` where there is no such folder.
    """
    repository = read(path)
    found, named, left = list[Finding](), dict[str, str](), list(repository.left_out)
    for source in repository.sources:
        found += requirements(source)
        if source.python:
            tree = source.tree()
            if tree is None:
                left.append((source.path, "no Python of this version"))
                continue
            named[source.module] = _first_line(tree)
            if not _tests(source):
                found += lore(source)
    return Survey(tuple(found), tuple(drafts(found, named)), tuple(left))


def _first_line(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").strip().partition("\n")[0].rstrip(".")


def _tests(source: Source) -> bool:
    """Whether a file is a test: what it warns of is made up."""
    *folders, name = source.path.split("/")
    return bool({"tests", "test"} & set(folders)) or name.startswith("test_") or name == "conftest.py"


def write(found: Survey, folder: str | Path, form: str = "markdown", overwrite: bool = False) -> Written:
    """Write the pages and their index. A page that somebody edited, or that is not of ours, is kept unless `overwrite`.

    Raises `ConfigError` for a format that there is not.
    """
    if form not in FORMATS:
        raise ConfigError(f"format={form!r}; allowed: {listing(FORMATS)}.")
    out, end = Path(folder), FORMATS[form]
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; a folder for the pages is needed.")
    out.mkdir(parents=True, exist_ok=True)
    texts = {page.name: page.text(form, INDEX) for page in found.pages}
    texts[INDEX] = index(found.pages, found.left_out, form)
    states: dict[str, list[str]] = {"written": [], "same": [], "kept": []}
    for name, text in texts.items():
        file = out / f"{name}{end}"
        states[_put(file, sealed(text), overwrite)].append(file.name)
    return Written(*(tuple(states[s]) for s in ("written", "same", "kept")))


def _put(file: Path, text: str, overwrite: bool) -> str:
    if file.is_symlink():
        return "kept"
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    if before == text:
        return "same"
    if before is not None and not overwrite and not untouched(before):
        return "kept"
    write_atomically(file, text.encode())
    return "written"


def sealed(text: str) -> str:
    """A page with its digest below."""
    return f"{text}\n<!-- {MARK}{_digest(text)} -->\n"


def untouched(text: str) -> bool:
    """Whether a page is as it was written."""
    body, _, end = text.rpartition(f"\n<!-- {MARK}")
    return bool(end) and end == f"{_digest(body)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
