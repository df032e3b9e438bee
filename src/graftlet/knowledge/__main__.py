# SPDX-License-Identifier: Apache-2.0
"""Bring the generated tables of the README and the docs up to date: `python -m graftlet.knowledge [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

from .tables import filled


def main(folder: Path) -> None:
    """Rewrite the pages whose tables have changed."""
    for page in [folder / "README.md", *sorted((folder / "docs").rglob("*.md"))]:
        text = page.read_text()
        if (made := filled(text)) != text:
            page.write_text(made)
            print(f"updated {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
