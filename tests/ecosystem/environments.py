# SPDX-License-Identifier: Apache-2.0
"""Three virtual environments: the libraries once, and two that see them and have a `peft` of their own.

So that whatever differs between two runs of a job comes from `peft` alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("GRAFTLET_ECOSYSTEM", ROOT / ".ecosystem"))
REFERENCE = "peft==0.21.2"


@dataclass(frozen=True)
class Environment:
    """A virtual environment at `folder`."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def site(self) -> Path:
        return next((self.folder / "lib").glob("python3*")) / "site-packages"

    def make(self, below: Environment | None = None) -> Environment:
        """Make it, unless it is there; with what `below` has installed in sight."""
        if not (self.folder / "bin" / "python").exists():
            venv.create(self.folder, with_pip=True)
        if below is not None:
            (self.site / "below.pth").write_text(f"{below.site}\n")
        return self

    def pip(self, *arguments: str) -> None:
        """Install something. A failure raises, with pip's own words."""
        done = subprocess.run([self.python, "-m", "pip", "install", "-q", *arguments], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pip install {' '.join(arguments)}:\n{done.stderr}")

    def versions(self, *packages: str) -> dict[str, str]:
        """What is installed, as a program there would be told."""
        code = f"import importlib.metadata as m; print(*[m.version(p) for p in {packages!r}])"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return dict(zip(packages, done.stdout.split(), strict=True))


def libraries() -> Environment:
    """The environment with the libraries, as `requirements.txt` has them; without any `peft`."""
    made = Environment(CACHE / "libraries").make()
    wanted, done = HERE / "requirements.txt", CACHE / "libraries" / "installed.txt"
    if not done.exists() or done.read_text() != wanted.read_text():
        made.pip("-r", str(wanted))
        done.write_text(wanted.read_text())
    return made


def reference() -> Environment:
    """The environment with the reference."""
    made = Environment(CACHE / "reference").make(libraries())
    made.pip("--no-deps", REFERENCE)
    return made


def dropin() -> Environment:
    """The environment with Graftlet and its `peft`, both built and installed as a person would."""
    made = Environment(CACHE / "dropin").make(libraries())
    with tempfile.TemporaryDirectory() as folder:
        made.pip("--no-deps", "--force-reinstall", *(copied(ROOT / part, Path(folder)) for part in ("", "compat/peft")))
    return made


def copied(source: Path, folder: Path) -> str:
    """A project as it would be built: in a place of its own, so that nothing of an earlier build is in it."""
    target = folder / (source.name or "project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (source / name).exists():
            target.mkdir(exist_ok=True)
            shutil.copy(source / name, target / name)
    shutil.copytree(source / "src", target / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return str(target)
