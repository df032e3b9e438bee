# SPDX-License-Identifier: Apache-2.0
"""What features need beside torch: the package, its versions, the command that installs it. Data, and what it says."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from .errors import DependencyError


@dataclass(frozen=True)
class Requirement:
    """feature: what needs it. package: its name where packages are installed from. versions: `>=` and `<`, comma-separated."""

    feature: str
    package: str
    versions: str

    @property
    def command(self) -> str:
        """What installs it."""
        return f'pip install "{self.package}{self.versions}"'

    @property
    def found(self) -> str | None:
        """The version that is installed; None where none is."""
        return version_of(self.package)

    @property
    def met(self) -> bool:
        """Whether a version that will do is installed."""
        found = self.found
        return found is not None and all(_holds(found, clause) for clause in self.versions.split(","))

    def check(self) -> None:
        """Raise `DependencyError`, with what is there, what is needed and how to get it, unless it is met."""
        if not self.met:
            there = "is not installed" if self.found is None else f"is installed as {self.found}"
            raise DependencyError(f"{self.feature} needs {self.package} {self.versions}, which {there}. {self.command}")


REQUIREMENTS: dict[str, Requirement] = {
    "bnb": Requirement("a base quantised by bitsandbytes", "bitsandbytes", ">=0.46.1,<1"),
    "torchao": Requirement("a base quantised by torchao", "torchao", ">=0.4,<1"),
    "quanto": Requirement("a base quantised by quanto", "optimum-quanto", ">=0.2.6,<1"),
    "hqq": Requirement("a base quantised by HQQ", "hqq", ">=0.2,<1"),
    "aqlm": Requirement("a base quantised by AQLM", "aqlm", ">=1.1,<2"),
    "compressed": Requirement("a base quantised by compressed-tensors", "compressed-tensors", ">=0.15,<1"),
}
"""By the name of the file in `weights/` that is for it."""


def version_of(package: str) -> str | None:
    """The version of a package that is installed; None where none is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def at_least(found: str | None, version: str) -> bool:
    """Whether a version, where there is one, is this one or later."""
    return found is not None and _numbers(found) >= _numbers(version)


def _holds(found: str, clause: str) -> bool:
    given, wanted = _numbers(found), _numbers(clause.strip("<>= "))
    return given < wanted if clause.startswith("<") else given >= wanted


def _numbers(version: str) -> tuple[int, ...]:
    """The release as numbers, without what follows them: 0.50.2.dev1+cpu is 0.50.2."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
