# SPDX-License-Identifier: Apache-2.0
"""The pages of the docs that are made from the data: text, indexes, links both ways. Nothing here is committed as a file."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import ConfigError, listing
from .book import implementation_of, markdown, of_kind, pages
from .codes import Code
from .heuristics import Heuristic
from .page import KINDS, Implementation, Page, Workflow, locate

DOCS = "docs"
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
INTROS = {
    "code": "Every error and warning ends with its code in brackets. `graftlet explain CODE` shows its page.",
    "environment": "What a kind of work needs. `graftlet doctor` looks whether it is here.",
    "heuristic": "When something bites, what to do, and what that was measured to be worth. `graftlet train` tells them.",
    "workflow": "What people do, step by step.",
    "principle": "The families of methods.",
    "implementation": "The code, by its docstrings.",
}


def path_of(page: Page) -> str:
    """Where a page stands below `docs/`."""
    if isinstance(page, Workflow):
        return page.source
    return f"{KINDS[page.kind].lower()}/{page.name.lower()}.md"


def index_of(kind: str) -> str:
    """Where the index of a kind stands."""
    return f"{KINDS[kind].lower()}/index.md"


def generated(root: Path) -> dict[str, str]:
    """Every page that is made, by its path below `docs/`: those of the data, their indexes, and results of benchmarks."""
    made = {path_of(page): written(page) for page in pages().values() if not isinstance(page, Workflow)}
    made |= {index_of(kind): index(kind) for kind in KINDS}
    results = root / "benchmarks" / "results"
    return made | {f"measured/{file.name}": file.read_text() for file in sorted(results.glob("*.md"))}


def written(page: Page) -> str:
    """A page as Markdown for the site."""
    here = path_of(page)
    text = markdown(page, lambda other: _link(here, other), lambda symbol: _code(here, symbol))
    if isinstance(page, Implementation):
        text = text.replace("\n\n## See also", f"\n\n{_directives(page)}\n\n## See also")
    return text


def see_also(page: Page) -> str:
    """What stands at the end of a page that is a file."""
    text = written(page)
    return text[text.index("## See also") :] if "## See also" in text else ""


def index(kind: str) -> str:
    """The list of all pages of a kind."""
    here, rows = index_of(kind), ["| name | |", "|---|---|"]
    for page in of_kind(kind):
        rows.append(f"| [`{page.name}`]({_relative(here, path_of(page))}) | {_gist(page)} |")
    return f"# {KINDS[kind]}\n\n{INTROS[kind]}\n\n" + "\n".join(rows) + "\n"


def _gist(page: Page) -> str:
    if isinstance(page, Code):
        return f"{'warning' if page.warning else 'error'}: {page.title}"
    if isinstance(page, Heuristic):
        return f"{page.title}. *{page.when}*"
    return page.title


def _link(here: str, page: Page) -> str:
    return f"[{page.title}]({_relative(here, path_of(page))})"


def _code(here: str, symbol: str) -> str:
    """A symbol with its file and line, and a link to the page of the code that it stands in."""
    module, _, name = symbol.partition(":")
    shown = f"`{module}.{name}`" if name else f"`{module}`"
    home = implementation_of(module)
    if home is not None:
        shown = f"[{shown}]({_relative(here, path_of(pages()[home]))})"
    return f"{shown}, `src/{locate(symbol)}`"


def _directives(page: Implementation) -> str:
    """What mkdocstrings writes the docstrings for: the modules, and those inside them."""
    return "\n\n".join(f"::: {module}\n    options:\n      heading_level: 2" for module in page.modules)


def _relative(here: str, there: str) -> str:
    return posixpath.relpath(there, posixpath.dirname(here))


def rewritten(text: str, here: str, root: Path) -> str:
    """A page's Markdown with links to files that are no part of the docs: to their page where there is one, else as words."""

    def turned(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        outside = posixpath.normpath(posixpath.join(DOCS, posixpath.dirname(here), target))
        if "://" in target or target.startswith("#") or outside.startswith(f"{DOCS}/"):
            return found[0]
        if outside.startswith("benchmarks/results/") and outside.endswith(".md"):
            return f"[{label}]({_relative(here, f'measured/{posixpath.basename(outside)}')})"
        return f"{label} (`{outside}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)\)", turned, text)


def check(root: Path) -> list[str]:
    """What is wrong with the docs: names without a page, links that lead nowhere or one way, evidence that is gone."""
    try:
        made = generated(root)
    except ConfigError as error:
        return [str(error)]
    files = {p.relative_to(root / DOCS).as_posix(): p.read_text() for p in sorted((root / DOCS).rglob("*.md"))}
    sources = {page.source: page for page in of_kind("workflow") if isinstance(page, Workflow)}
    everything = {
        **{path: rewritten(text, path, root) for path, text in files.items()},
        **{path: rewritten(text, path, root) for path, text in made.items()},
    }
    for source, page in sources.items():
        if source not in files:
            return [f"the page {page.name!r} is to be {DOCS}/{source}, which is not there."]
        everything[source] += "\n\n" + see_also(page)
    return [*_dangling(everything, root), *_one_way(everything), *_missing(everything)]


def _targets(path: str, text: str) -> Iterable[str]:
    for target, _ in LINK.findall(text):
        if "://" not in target:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _dangling(everything: Mapping[str, str], root: Path) -> list[str]:
    wrong = []
    for path, text in everything.items():
        for target in _targets(path, text):
            if target not in everything and not (root / DOCS / target).exists():
                wrong.append(f"{path} links to {target}, which is not there.")
    return wrong


def _one_way(everything: Mapping[str, str]) -> list[str]:
    """Links under *See also* between pages of the data that the other page does not have."""
    told = {path_of(page): set() for page in pages().values()}
    for path in told:
        told[path] = set(_targets(path, everything[path].partition("## See also")[2])) & set(told)
    return [f"{a} links to {b}, which does not link back." for a in told for b in sorted(told[a]) if a not in told[b]]


def _missing(everything: Mapping[str, str]) -> list[str]:
    """Pages that no index has, and codes that a text names and that no page is of."""
    wrong = [
        f"{path_of(page)} is in no index."
        for page in pages().values()
        if path_of(page) not in set(_targets(index_of(page.kind), everything[index_of(page.kind)]))
    ]
    known = {name for name, page in pages().items() if page.kind in ("code", "environment", "heuristic")}
    for path, text in everything.items():
        named = set(re.findall(r"graftlet explain ([a-z][\w-]+)", text)) - known
        if named:
            wrong.append(f"{path} names {listing(sorted(named))}, which no page is of.")
    return wrong
