# SPDX-License-Identifier: Apache-2.0
"""Tables for the docs and the README, made from the registry."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..registry import Entry, entries

PAPER = re.compile(r"\(?(?:arXiv )?(\d{4}\.\d{4,5})\)?")


LAWS = {"sum": "add up", "chain": "one after another", "one": "one at a time"}


@dataclass(frozen=True)
class Row:
    """One method as the tables show it."""

    name: str
    title: str
    formula: str
    paper: str | None
    family: str
    layers: str
    several: str
    merges: bool
    config: str


def rows() -> list[Row]:
    """All registered methods, by name."""
    return [row(entry) for entry in entries()]


def row(entry: Entry) -> Row:
    """What the first line of a method's module, `Name: words (paper).   formula`, and its class say."""
    head, _, formula = entry.summary.partition("   ")
    name, _, title = head.partition(":")
    found = PAPER.search(title)
    title = re.sub(r"\s*\([^()]*\)\s*", " ", title).strip(" .")
    return Row(
        name=name.strip(),
        title=title,
        formula=" ".join(formula.split()),
        paper=found[1] if found else None,
        family=entry.family,
        layers=", ".join(site.__name__ for site in entry.sites) or _where(entry.family),
        several=LAWS[getattr(entry.method, "law", "one")],
        merges=bool(entry.sites or entry.family == "Replace") and getattr(entry.method, "unmergeable", None) is None,
        config=entry.config.__name__,
    )


def _where(family: str) -> str:
    return {"Replace": "any module", "Block": "whole blocks"}.get(family, "the model's input")


def methods_markdown() -> str:
    """The table of methods as Markdown."""
    heads = ("method", "config", "what it does", "family", "layers", "several active", "merges")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows():
        title = f"[{r.title}](https://arxiv.org/abs/{r.paper})" if r.paper else r.title
        shown = r.formula.replace("|", "\\|")  # a bar would end the cell
        formula = f"<br>`{shown}`" if shown else ""
        merges = "yes" if r.merges else "no"
        lines.append(
            f"| {r.name} | `{r.config}` | {title}{formula} | {r.family} | {r.layers} | {r.several} | {merges} |"
        )
    return "\n".join(lines)


def family_markdown(family: str) -> str:
    """A family's methods as a list, each with its formula."""
    lines = []
    for r in (r for r in rows() if r.family == family):
        title = f"[{r.title}](https://arxiv.org/abs/{r.paper})" if r.paper else r.title
        formula = f" `{r.formula}`." if r.formula else ""
        merges = "merges" if r.merges else "does not merge"
        lines.append(f"- **{r.name}** (`{r.config}`): {title}.{formula} On {r.layers}; {merges}; several {r.several}.")
    return "\n".join(lines)


def filled(text: str) -> str:
    """A document with what stands between `<!-- methods -->` and `<!-- /methods -->` made anew."""
    return re.sub(
        r"(<!-- methods -->\n).*?(\n<!-- /methods -->)",
        lambda found: found[1] + methods_markdown() + found[2],
        text,
        flags=re.DOTALL,
    )
