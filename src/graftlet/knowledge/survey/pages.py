# SPDX-License-Identifier: Apache-2.0
"""Pages of what was found: an environment for each group of requirements, heuristics for each module, and an index."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .findings import LORE, REQUIREMENTS, Finding

FORMATS = {"markdown": ".md", "mediawiki": ".mediawiki"}


@dataclass(frozen=True)
class Draft:
    """A page for a person to edit. kind: environment or heuristic."""

    kind: str
    name: str
    title: str
    findings: tuple[Finding, ...]

    def text(self, form: str, index: str) -> str:
        """The page in a format; `index` is what the index is called."""
        mark = MARKUPS[form]
        known = REQUIREMENTS if self.kind == "environment" else LORE
        lines = [mark.heading(1, self.title), "", f"{self._lead()} {mark.link(index, 'All pages')}.", ""]
        for kind, meaning in known.items():
            held = [f for f in self.findings if f.kind == kind]
            if held:
                lines += [mark.heading(2, meaning[0].upper() + meaning[1:]), ""]
                lines += [mark.item(_row(f, mark)) for f in held]
                lines.append("")
        lines += [mark.heading(2, "What to do"), "", "To be written.", ""]
        return "\n".join(lines)

    def _lead(self) -> str:
        if self.kind == "environment":
            packages = sorted({f.package for f in self.findings})
            return f"Needs {', '.join(packages)}."
        return f"{len(self.findings)} places say something to keep in mind."


@dataclass(frozen=True)
class Markup:
    """How a format writes headings, items, code and links."""

    heading: Callable[[int, str], str]
    item: Callable[[str], str]
    code: Callable[[str], str]
    link: Callable[[str, str], str]
    safe: Callable[[str], str]


def _row(finding: Finding, mark: Markup) -> str:
    asked = f"{finding.package} {finding.versions}".strip() + ": " if finding.package else ""
    symbol = f", in {mark.code(finding.symbol)}" if ":" in finding.symbol else ""
    return f"{mark.safe(asked + finding.text)} ({mark.code(finding.place)}{symbol})"


MARKUPS = {
    "markdown": Markup(
        lambda level, text: f"{'#' * level} {text}",
        lambda text: f"- {text}",
        lambda text: f"`{text}`",
        lambda to, text: f"[{text}]({to}.md)",
        lambda text: re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text),
    ),
    "mediawiki": Markup(
        lambda level, text: f"{'=' * level} {text} {'=' * level}",
        lambda text: f"* {text}",
        lambda text: f"<code><nowiki>{text.replace('<', '&lt;')}</nowiki></code>",
        lambda to, text: f"[[{to}|{text}]]",
        lambda text: "<nowiki>" + text.replace("<", "&lt;") + "</nowiki>",
    ),
}


def drafts(findings: Sequence[Finding], named: dict[str, str]) -> Iterator[Draft]:
    """The pages: requirements by group, then those that code alone tells by package; lore by module.

    named: what each module says of itself in its first line.
    """
    groups: dict[str, list[Finding]] = defaultdict(list)
    declared = {_plain(f.package): f.group for f in findings if f.kind == "declared"}
    for finding in (f for f in findings if f.kind in REQUIREMENTS):
        plain = _plain(finding.package)
        group = finding.group if finding.kind == "declared" else declared.get(plain, f"package {finding.package}")
        groups[group].append(finding)
    for group, held in sorted(groups.items()):
        title = (
            f"To use {group.removeprefix('package ')}"
            if group.startswith("package ")
            else (f"The extra {group!r}" if group else "To run at all")
        )
        yield Draft("environment", slug(f"environment {group or 'base'}"), title, tuple(held))
    modules: dict[str, list[Finding]] = defaultdict(list)
    for finding in (f for f in findings if f.kind in LORE):
        modules[finding.module].append(finding)
    for module, held in sorted(modules.items()):
        said = named.get(module, "")
        title = f"{module}: {said}" if said else module
        yield Draft("heuristic", slug(f"heuristic {module}"), title[:120], tuple(held))


def index(pages: Sequence[Draft], left_out: Sequence[tuple[str, str]], form: str) -> str:
    """The index of all pages."""
    mark = MARKUPS[form]
    lines = [mark.heading(1, "What this repository needs, and what is known of it"), ""]
    for kind, title in (("environment", "Environments"), ("heuristic", "Heuristics")):
        held = [p for p in pages if p.kind == kind]
        lines += [mark.heading(2, title), ""]
        lines += [mark.item(f"{mark.link(p.name, p.title)} ({len(p.findings)})") for p in held]
        lines.append("")
    if left_out:
        lines += [mark.heading(2, "Left out"), ""]
        lines += [mark.item(f"{mark.code(name)}: {why}") for name, why in left_out]
        lines.append("")
    return "\n".join(lines)


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:100]
