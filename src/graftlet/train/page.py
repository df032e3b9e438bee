# SPDX-License-Identifier: Apache-2.0
"""HTML pages in one file: nothing is loaded from anywhere, pictures are data, colours follow the reader's scheme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


def page(title: str, *parts: str) -> str:
    """A whole page."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, soft: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """The figures that matter most: value and what it is."""
    cards = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in figures)
    return f'<div class="tiles">{cards}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0, marked: int = -1) -> str:
    """A table whose last `numbers` columns are figures and whose row `marked` stands out."""

    def line(cells: Sequence[str], tag: str) -> str:
        first = len(cells) - numbers
        return "".join(
            f"<{tag}{' class=number' if i >= first else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr{' class=mark' if i == marked else ''}>{line(r, 'td')}</tr>\n" for i, r in enumerate(rows))
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>\n{top}\n<tbody>\n{body}</tbody></table></div>'


def said(pairs: Iterable[tuple[str, str]]) -> str:
    """A card of names and texts."""
    inner = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    return f'<div class="said"><dl>{inner}</dl></div>'


def folded(title: str, text: str) -> str:
    """A text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
