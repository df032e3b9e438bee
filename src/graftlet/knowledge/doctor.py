# SPDX-License-Identifier: Apache-2.0
"""What works on this machine, what does not, why, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CallError, nearest
from . import environments
from .environments import Environment
from .features import Finding, examine


@dataclass(frozen=True)
class Ward:
    """An environment, and what was found of its features."""

    environment: Environment
    findings: tuple[Finding, ...]

    @property
    def works(self) -> bool:
        """Whether the environment serves: by all that is not optional, or by one of several that will do."""
        needed = [found.works for found in self.findings if not found.feature.optional]
        return (any if self.environment.alternatives else all)(needed or [found.works for found in self.findings])


@dataclass(frozen=True)
class Diagnosis:
    """What was found. asked: the feature, where one was asked for."""

    wards: tuple[Ward, ...]
    asked: str | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found, each feature once."""
        return tuple({found.feature.name: found for ward in self.wards for found in ward.findings}.values())

    @property
    def well(self) -> bool:
        """What was asked for works; where nothing was, what is installed is whole, and the core works."""
        if self.asked is not None:
            return all(ward.works for ward in self.wards)
        return all(found.state != "broken" for found in self.findings) and all(
            found.works for found in self.findings if found.feature.name == "adapters"
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "well": self.well,
            "asked": self.asked,
            "environments": {ward.environment.name: [_plain(f) for f in ward.findings] for ward in self.wards},
        }


def diagnose(feature: str | None = None) -> Diagnosis:
    """Look at everything, or at one feature, environment or public name.

    Raises `CallError`, with the nearest names, where there is no such thing.
    """
    if feature is None:
        return Diagnosis(tuple(Ward(e, tuple(map(examine, e.features))) for e in environments.PAGES))
    wanted = environments.features_of(feature)
    if not wanted:
        known = environments.names()
        raise CallError(f"there is no feature {feature!r}{nearest(feature, known) or '.'} `graftlet doctor` shows all.")
    named = [e for e in environments.PAGES if e.name == feature] or [
        next(e for e in environments.PAGES if f in e.features) for f in wanted
    ]
    wards = [Ward(e, tuple(examine(f) for f in e.features if f in wanted)) for e in {e.name: e for e in named}.values()]
    return Diagnosis(tuple(wards), feature)


def _plain(found: Finding) -> dict[str, Any]:
    return {
        "feature": found.feature.name,
        "title": found.feature.title,
        "state": found.state,
        "why": found.why,
        "command": found.command,
        "packages": {p.package: {"needed": p.versions, "found": p.found} for p in found.feature.packages},
        "note": found.feature.note,
    }
