# SPDX-License-Identifier: Apache-2.0
"""The codes of errors and warnings: what brings each of them, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import SILENCE, STRICT, GraftletError, GraftletWarning
from ..page import Page
from ..source import givings


@dataclass(frozen=True, kw_only=True)
class Code(Page):
    """of: the class that carries the code. mend: what to do."""

    kind = "code"
    of: type[GraftletError] | type[GraftletWarning]
    mend: str

    @property
    def warning(self) -> bool:
        """Whether it is a warning."""
        return issubclass(self.of, Warning)

    @property
    def places(self) -> list[str]:
        """Where it is given, as `file:line`."""
        return [f"src/{place}" for name, place in givings() if name == self.of.__name__]

    def sections(self) -> dict[str, str]:
        kind = "Warning" if self.warning else "Error"
        bases = [b.__name__ for b in self.of.__mro__[1:] if b not in (object, Exception, BaseException)]
        told = {
            "What to do": self.mend,
            kind: f"`graftlet.errors.{self.of.__name__}`, which is a `{'`, `'.join(bases)}`.",
        }
        if self.warning and self.places:
            told[kind] += (
                f'\n\n`graftlet.silence("{self.name}")` or `{SILENCE}={self.name}` keeps it quiet; '
                f"`{STRICT}=1` makes it an error."
            )
        if self.places:
            more = f" and {len(self.places) - 12} more" if len(self.places) > 12 else ""
            told["Given at"] = ", ".join(f"`{place}`" for place in self.places[:12]) + more
        return told


def code(
    of: type[GraftletError] | type[GraftletWarning],
    text: str,
    mend: str,
    *links: str,
    evidence: tuple[str, ...] = (),
) -> Code:
    """The page of a class: its name is the class's code, its title what the class says of itself."""
    title = " ".join((of.__doc__ or of.__name__).split()).rstrip(".")
    return Code(name=of.code, title=title, text=text, mend=mend, of=of, links=links, evidence=evidence)
