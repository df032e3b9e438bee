# SPDX-License-Identifier: Apache-2.0
"""Measuring layers a few at a time, in bounded memory, and going on where a measuring that was killed had come to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...errors import ConfigError
from ...weights.site import Site

ROOM = 4 * 2**30
"""Bytes that the measurements of layers in progress may take, unless it is said."""
SAMPLE = 64
T = TypeVar("T")


def turns(sizes: Mapping[str, int], room: float, again: bool) -> list[list[str]]:
    """Layers, of these sizes in bytes, in groups that fit into `room`; all at once where the data cannot be seen `again`."""
    groups: list[list[str]] = [[]]
    for path in sizes:
        if again and groups[-1] and sum(sizes[p] for p in [*groups[-1], path]) > room:
            groups.append([])
        groups[-1].append(path)
    return groups


def can_be_seen_again(data: Any) -> bool:
    """Whether data is more than what is left of an iterator."""
    return callable(data) or not isinstance(data, Iterator)


@torch.no_grad()
def key_of(sites: Mapping[str, Site], **facts: Any) -> str:
    """What tells one measurement from another: these facts, the layers, their shapes, and a sample of their weights."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path, site in sites.items():
        kept = site.weight.detach().flatten()
        sample = kept[:: max(1, len(kept) // SAMPLE)].cpu().double()
        digest.update(f"{path} {tuple(site.weight.shape)} {sample.tolist()}".encode())
    return digest.hexdigest()


class Record:
    """What was found of each layer, in a file; as long as it is not all, in one beside it that ends in `.part`.

    Raises `ConfigError` where the file holds what was found of something else.
    """

    def __init__(self, file: str | Path | None, key: str) -> None:
        self.file = None if file is None else Path(file)
        self.part = None if self.file is None else self.file.with_name(f"{self.file.name}.part")
        self.key = key
        self.found: dict[str, Any] = {}
        for place in (self.part, self.file):
            if place is not None and place.exists():
                self.found = self._read(place)

    def _read(self, place: Path) -> dict[str, Any]:
        held = torch.load(place, map_location="cpu", weights_only=True)
        if not held.keys() >= {"key", "found"}:
            return held  # as earlier files are
        if held["key"] != self.key:
            raise ConfigError(
                f"{place} was found for another model, other layers or other options; delete it, or name another file."
            )
        if "random" in held:
            torch.set_rng_state(held["random"])  # what is left draws what it would have drawn
        return held["found"]

    def add(self, found: Mapping[str, Any], whole: bool) -> None:
        """Keep what was found of some layers; `whole` where no other is left."""
        self.found.update(found)
        place = self.file if whole else self.part
        if place is None or self.part is None:
            return
        new = place.with_name(f".{place.name}.{os.getpid()}")
        torch.save({"key": self.key, "found": self.found} | ({} if whole else {"random": torch.get_rng_state()}), new)
        os.replace(new, place)
        if whole:
            self.part.unlink(missing_ok=True)


def measured(
    record: Record,
    groups: Iterable[list[str]],
    measure: Callable[[list[str]], Mapping[str, Any]],
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """What is found of all layers, group by group: what the record has is not measured again. `tell` counts layers."""
    left = [group for paths in groups if (group := [p for p in paths if p not in record.found])]
    tell(len(record.found))
    for i, group in enumerate(left, 1):
        record.add(measure(group), i == len(left))
        tell(len(group))
    return record.found


@contextmanager
def progress(total: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of so many layers, and the function that moves it on by some."""
    if not shown:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="layer") as bar:

        def tell(count: int) -> None:
            bar.update(count)

        yield tell
