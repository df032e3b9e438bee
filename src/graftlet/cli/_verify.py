# SPDX-License-Identifier: Apache-2.0
"""`graftlet verify`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ..verify import verify


def show(folder: Path, as_json: bool) -> None:
    """Say what a directory contains and whether it would load; the command fails where it would not."""
    found = verify(folder)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        for name in ("method", "task", "base", "tensors", "numbers", "bytes", "kinds", "base_fingerprint", "files"):
            if (value := found.facts.get(name)) is not None:
                typer.echo(
                    f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
                )
        for line in found.notes:
            typer.echo(f"note: {line}")
        for line in found.wrong:
            typer.echo(f"wrong: {line}")
        typer.echo("it would load on the base that it was made for" if found.sound else "it would not load")
    if not found.sound:
        raise typer.Exit(1)
