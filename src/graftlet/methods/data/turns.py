# SPDX-License-Identifier: Apache-2.0
"""Measuring layers a few at a time, in bounded memory, and going on where a measuring that was killed had come to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...weights.site import Site
from ...weights.whole import shape_of

ROOM = 4 * 2**30
"""Bytes that the measurements of layers in progress may take, unless it is said."""
SAMPLE = 64
PIECES = 8
"""In how many pieces, at most, what is found in one turn is written down."""
Shown: TypeAlias = "bool | Callable[[int, int, int], None]"
"""How far a measuring is: a bar on the terminal, or a function that is told layers done, layers in all, calls of the model."""


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
        digest.update(f"{path} {tuple(shape_of(site.weight))} {sample.tolist()}".encode())
    return digest.hexdigest()


def trace_of(data: Any) -> str | None:
    """What tells some data from other data: how much it is, and a sample of it. None where that cannot be told.

    Data that can be looked up by number can be told: a list, a dataset, a loader of one, in whichever order it shuffles.
    """
    rows = getattr(data, "dataset", data)
    if not (callable(getattr(rows, "__len__", None)) and callable(getattr(rows, "__getitem__", None))):
        return None
    places = range(0, len(rows), max(1, len(rows) // SAMPLE))
    try:
        first, second = ([_written(rows[i]) for i in places] for _ in range(2))
    except (KeyError, IndexError, TypeError):  # looked up by something else
        return None
    if first != second:
        return f"{len(rows)} rows that are made anew"
    return hashlib.sha256(f"{len(rows)} {first}".encode()).hexdigest()


def _written(value: Any) -> str:
    """A row of data as text."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.detach().flatten()[:SAMPLE].tolist()}"
    if isinstance(value, Mapping):
        return str([(str(k), _written(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return str([len(value), *map(_written, value[:SAMPLE])])
    return repr(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__


class Record:
    """What was found of each layer, in a file; as long as it is not all, in one beside it that ends in `.part`.

    key: what it was found of, and how. data: on what. Raises `ConfigError` where the file holds what was found of something
    else.
    """

    def __init__(self, file: str | Path | None, key: str, data: Any = None) -> None:
        self.file = None if file is None else Path(file)
        self.part = None if self.file is None else self.file.with_name(f"{self.file.name}.part")
        self.key, self.data = key, None if file is None else trace_of(data)
        self.found: dict[str, Any] = {}
        for place in (self.part, self.file):
            if place is not None and place.exists():
                self.found = self._read(place)

    def _read(self, place: Path) -> dict[str, Any]:
        held = torch.load(place, map_location="cpu", weights_only=True)
        of = held if isinstance(held, dict) else {}
        if of.get("key") != self.key or (self.data and of.get("data") and of["data"] != self.data):
            raise ConfigError(
                f"{place} was found for another model, other layers, other data or other options; delete it, or name "
                "another file."
            )
        if "random" in of:
            torch.set_rng_state(of["random"])  # what is left draws what it would have drawn
        return of["found"]

    def add(self, found: Mapping[str, Any], random: Tensor | None = None) -> None:
        """Keep what was found of some layers. random: with what random numbers the others are begun; None at the end."""
        self.found.update(found)
        place = self.file if random is None else self.part
        if place is None or self.part is None:
            return
        new = place.with_name(f".{place.name}.{os.getpid()}")
        held = {"key": self.key, "data": self.data, "found": self.found}
        torch.save(held if random is None else {**held, "random": random}, new)
        os.replace(new, place)
        if random is None:
            self.part.unlink(missing_ok=True)


def measured(
    record: Record,
    groups: Iterable[list[str]],
    measure: Callable[[list[str]], Iterable[Mapping[str, Any]]],
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """What is found of all layers, group by group: what the record has is not measured again. `tell` counts layers.

    `measure` gives what it finds of a group's layers as it finds it, in as many pieces as it likes.
    """
    left = [group for paths in groups if (group := [p for p in paths if p not in record.found])]
    tell(len(record.found))
    for i, group in enumerate(left, 1):
        begun, fresh = torch.get_rng_state(), dict[str, Any]()
        for piece in measure(group):
            if PIECES * len(fresh) >= len(group):
                record.add(fresh, begun)
                fresh = {}
            fresh.update(piece)
            tell(len(piece))
        record.add(fresh, None if i == len(left) else torch.get_rng_state())
    return record.found


@contextmanager
def progress(model: nn.Module, total: int, what: str, shown: Shown) -> Iterator[Callable[[int], None]]:
    """Show how far a measuring of `total` layers is until the block ends; gives the function that counts layers done."""
    if shown is False:
        yield lambda count: None
        return
    with _bar(total, what) if shown is True else nullcontext(shown) as show:
        done, calls = 0, 0

        def layers(count: int) -> None:
            nonlocal done
            done += count
            show(done, total, calls)

        def call(*_: Any) -> None:
            nonlocal calls
            calls += 1
            show(done, total, calls)

        handle = model.register_forward_hook(call)
        try:
            yield layers
        finally:
            handle.remove()


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int, int, int], None]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="layer") as bar:

        def show(done: int, total: int, calls: int) -> None:
            bar.set_postfix_str(f"{calls} batches", refresh=False)
            bar.update(done - bar.n)

        yield show
