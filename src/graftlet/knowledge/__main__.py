# SPDX-License-Identifier: Apache-2.0
"""Bring what is generated and kept up to date: the tables of the README and the docs, and what heuristics say was measured.

python -m graftlet.knowledge [FOLDER]            bring it up to date
python -m graftlet.knowledge --check [FOLDER]    say what is wrong with the docs, and fail
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .book import of_kind
from .heuristics import MEASURED, Heuristic, told_effects
from .site import check
from .tables import filled


def measured(results: Path) -> str:
    """The text of `measured.json`, from the results of benchmarks."""
    pages = [page for page in of_kind("heuristic") if isinstance(page, Heuristic)]
    return json.dumps({page.name: told_effects(page, results) for page in pages}, indent=1, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    """Rewrite what has changed."""
    text = measured(folder / "benchmarks" / "results")
    if not MEASURED.is_file() or MEASURED.read_text() != text:
        MEASURED.write_text(text)
        print(f"updated {MEASURED}")
    for page in [folder / "README.md", *sorted((folder / "docs").rglob("*.md"))]:
        text = page.read_text()
        if (made := filled(text)) != text:
            page.write_text(made)
            print(f"updated {page}")


def checked(folder: Path) -> int:
    """Say what is wrong with the docs: how much it is."""
    wrong = check(folder)
    for line in wrong:
        print(line, file=sys.stderr)
    return len(wrong)


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if a != "--check"]
    place = Path(given[0] if given else ".")
    if "--check" in sys.argv:
        sys.exit(1 if checked(place) else 0)
    main(place)
