# SPDX-License-Identifier: Apache-2.0
"""All pages, by name, and how they hang together."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping

from ..errors import CallError, ConfigError, nearest
from .page import KINDS, Page, locate

SOURCES = (
    "codes.errors",
    "codes.warnings",
    "environments",
    "heuristics.models",
    "heuristics.training",
    "heuristics.memory",
    "heuristics.several",
    "heuristics.files",
    "workflows",
    "principles",
    "implementations",
)
"""The modules with pages, each a tuple `PAGES`."""


@functools.cache
def pages() -> Mapping[str, Page]:
    """Every page by its name, in the order of the kinds. Raises `ConfigError` where two have one name."""
    found: dict[str, Page] = {}
    for source in SOURCES:
        for page in importlib.import_module(f"{__package__}.{source}").PAGES:
            if page.name in found:
                raise ConfigError(f"two pages are called {page.name!r}: {found[page.name].title!r} and {page.title!r}.")
            found[page.name] = page
    order = list(KINDS)
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].kind)))


def of_kind(kind: str) -> list[Page]:
    """The pages of one kind."""
    return [page for page in pages().values() if page.kind == kind]


def find(name: str) -> Page:
    """The page of a name. Raises `CallError`, with the nearest names, where there is none."""
    known = pages()
    given = name.strip("[] ")
    if given not in known:
        raise CallError(f"there is no page {name!r}{nearest(given, known) or '.'} `graftlet explain` lists them all.")
    return known[given]


@functools.cache
def _links() -> dict[str, set[str]]:
    linked: dict[str, set[str]] = {name: set() for name in pages()}
    for page in pages().values():
        for other in (*page.links, *_implementing(page)):
            if other not in linked:
                raise ConfigError(
                    f"the page {page.name!r} links to {other!r}, which is no page{nearest(other, linked)}"
                )
            if other != page.name:
                linked[page.name].add(other)
                linked[other].add(page.name)
    return linked


def linked(page: Page) -> list[Page]:
    """The pages that this one links to, and those that link to it, in the order of the kinds."""
    return [p for p in pages().values() if p.name in _links()[page.name]]


def _implementing(page: Page) -> Iterator[str]:
    """The pages of the code that this page's evidence stands in."""
    for symbol in page.evidence:
        module = symbol.partition(":")[0]
        if (home := implementation_of(module)) is not None:
            yield home


def implementation_of(module: str) -> str | None:
    """The page on which a module stands: the one whose longest module is it, or is above it."""
    best, name = "", None
    for page in pages().values():
        for own in getattr(page, "modules", ()):
            if (module == own or module.startswith(f"{own}.")) and len(own) > len(best):
                best, name = own, page.name
    return name


def markdown(page: Page, link: Callable[[Page], str], code: Callable[[str], str]) -> str:
    """A page as Markdown. link: how another page is written; code: how a symbol is."""
    parts = [f"# {page.title}", f"`{page.name}` · {page.kind}", page.text.strip()]
    for heading, text in page.sections().items():
        parts += [f"## {heading}", text.strip()]
    if page.evidence:
        parts += ["## In the code", "\n".join(f"- {code(symbol)}" for symbol in page.evidence)]
    if others := linked(page):
        parts.append("## See also")
        for kind, title in KINDS.items():
            if of := [link(other) for other in others if other.kind == kind]:
                parts.append(f"{title}: {', '.join(of)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(page: Page) -> str:
    """A page as Markdown that stands alone, as a terminal shows it."""
    return markdown(page, lambda other: f"`{other.name}`", lambda symbol: f"`{symbol}` (src/{locate(symbol)})")
