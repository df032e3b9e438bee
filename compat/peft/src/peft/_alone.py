# SPDX-License-Identifier: Apache-2.0
"""Whether this is the only `peft` there is: it stands in for the reference, and says so where both are installed.

pip replaces a distribution by another one of its name, so that one install cannot leave both. They meet where one was
installed into another folder (`--target`, `--user`, PYTHONPATH), or copied over the other by hand.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

OURS = {"__init__.py", "_alone.py", "_places.py", "_serve.py"}
ALLOWED = "GRAFTLET_SHADOWS_PEFT"
"""The environment variable that lets this package stand before another one."""


def check(file: str, version: str) -> None:
    """Raise `ImportError` where another `peft` is installed beside this one, or has files in its folder."""
    folder = Path(file).parent
    foreign = sorted({p.name for p in folder.glob("*.py")} - OURS)
    if foreign:
        raise ImportError(
            f"{folder} holds two packages named peft: Graftlet's, and one with {', '.join(foreign[:3])}. Remove both "
            "(pip uninstall peft, then delete what is left of the folder), and install the one that you want."
        )
    others = [d for d in metadata.distributions(name="peft") if d.version != version]
    if others and os.environ.get(ALLOWED, "") in ("", "0"):
        there = ", ".join(f"{d.version} in {d.locate_file('')}" for d in others)
        raise ImportError(
            f"Graftlet's peft in {folder.parent} would hide another one: peft {there}. Uninstall one of them "
            f"(pip uninstall peft), or set {ALLOWED}=1 if that is meant."
        )
