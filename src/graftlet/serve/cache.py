# SPDX-License-Identifier: Apache-2.0
"""Adapters from disk in bounded memory: a cache of files on the host, and places in a model that they take turns in."""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import PeftConfig
from ..core.state import check_finite
from ..errors import CallError
from ..model.peft_model import PeftModel
from ..model.save import Checks, opened
from .hotswap import swap

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Loaded:
    """An adapter's file in the host's memory."""

    config: PeftConfig
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


class AdapterCache:
    """Adapter files on the host, the least recently used out first.

    Args:
        capacity: how many bytes of tensors are kept at most.
        find: where an adapter of a name is: a folder that holds one of each name, or a function.
        pin: keep them in pinned memory, from which a GPU is filled faster and in the background; where CUDA is there.
        threads: how many files are read at a time by `prefetch`.

    Safe to use from several threads.
    """

    def __init__(
        self,
        capacity: int,
        find: Source | Callable[[str], Source] = ".",
        pin: bool | None = None,
        threads: int = 2,
    ) -> None:
        if capacity < 1:
            raise CallError(f"capacity={capacity}; a positive number of bytes is needed.")
        self.capacity = capacity
        self.find = find if callable(find) else _inside(find)
        self.pin = torch.cuda.is_available() if pin is None else pin
        self.hits = self.misses = 0
        self._held: OrderedDict[str, Loaded] = OrderedDict()
        self._coming: dict[str, Future[Loaded]] = {}
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(threads, "graftlet-adapters")

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(loaded.nbytes for loaded in list(self._held.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str) -> Loaded:
        """An adapter, read if it is not held. Raises `AdapterFileError` or `ConfigError` where it cannot be read."""
        with self._lock:
            if name in self._held:
                self.hits += 1
                self._held.move_to_end(name)
                return self._held[name]
            self.misses += 1
            coming = self._request(name)
        return coming.result()

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin to read adapters; whoever gets one waits for what is left of it. An error is raised to them."""
        with self._lock:
            for name in names:
                if name not in self._held:
                    self._request(name)

    def drop(self, name: str) -> None:
        """Forget an adapter, so that its file is read anew."""
        with self._lock:
            self._held.pop(name, None)

    def close(self) -> None:
        """End the reading threads, and forget all."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._held.clear()

    def _request(self, name: str) -> Future[Loaded]:
        if name not in self._coming:
            self._coming[name] = self._readers.submit(self._read, name)
        return self._coming[name]

    def _read(self, name: str) -> Loaded:
        try:
            source = self.find(name)
            config, stored = opened(source, None, Checks())
            tensors = stored.read()
            check_finite(tensors, str(source))
            if self.pin:
                tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
            loaded = Loaded(config, tensors)
            with self._lock:
                self._keep(name, loaded)
            return loaded
        finally:
            with self._lock:
                self._coming.pop(name, None)

    def _keep(self, name: str, loaded: Loaded) -> None:
        self._held[name] = loaded
        while self.nbytes > self.capacity and self._held:  # one larger than all there is room for is not kept
            self._held.popitem(last=False)


def _inside(folder: Source) -> Callable[[str], Source]:
    return lambda name: Path(folder, name)


class AdapterPool:
    """More adapters than fit into a model, in turns: as many places as are asked for, each filled by hotswap.

    Args:
        model: its active adapter has the structure that all of them have; ranks and scalings may differ.
        cache: where they come from. places: how many stand in the model at a time.

    A batch takes what it needs and keeps it until it is through:

        with pool.rows(["anna", "ben", "anna"]) as rows:
            model(**batch, adapter_names=rows)

    Batches may come from several threads. One waits where all places are taken by others.
    """

    def __init__(self, model: PeftModel, cache: AdapterCache, places: int = 8) -> None:
        if places < 1:
            raise CallError(f"places={places}; at least one is needed.")
        self.model, self.cache = model, cache
        config = model.peft_config[model.active_adapter]
        self.places = [f"place-{i}" for i in range(places)]
        self.standing: OrderedDict[str, str] = OrderedDict()  # adapter -> place, the least recently used first
        self._taken: dict[str, int] = {}
        self._free = list(self.places)
        self._changed = threading.Condition()
        for place in self.places:
            model.add_adapter(place, _copied(config), low_cpu_mem_usage=False)
        model.eval()

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[list[str]]:
        """The places of these adapters, one a row, for `adapter_names`; they stay until the block ends.

        Raises `CallError` where they are more than there are places, and what `AdapterCache.get` and hotswap raise.
        """
        wanted = list(dict.fromkeys(names))
        if len(wanted) > len(self.places):
            raise CallError(
                f"a batch of {len(wanted)} adapters, but {len(self.places)} places; split it, or make more."
            )
        self.cache.prefetch([n for n in wanted if n not in self.standing])
        taken: list[str] = []
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._room(wanted))
                for name in wanted:
                    self._take(name)
                    taken.append(name)
                places = [self.standing[name] for name in names]
            yield places
        finally:
            with self._changed:
                for name in taken:
                    self._taken[name] -= 1
                self._changed.notify_all()

    def _room(self, wanted: Sequence[str]) -> bool:
        idle = sum(not self._taken.get(n) for n in self.standing if n not in wanted)
        return len(self._free) + idle >= sum(n not in self.standing for n in wanted)

    def _take(self, name: str) -> None:
        if name not in self.standing:
            loaded = self.cache.get(name)
            place = self._free[-1] if self._free else self.standing[self._idle()]
            swap(self.model, loaded.tensors, place, _copied(loaded.config), name)
            self._settle(name, place)
        self.standing.move_to_end(name)
        self._taken[name] = self._taken.get(name, 0) + 1

    def _idle(self) -> str:
        return next(name for name in self.standing if not self._taken.get(name))

    def _settle(self, name: str, place: str) -> None:
        if place in self._free:
            self._free.remove(place)
        for other in [n for n, p in self.standing.items() if p == place]:
            del self.standing[other]
            self._taken.pop(other, None)
        self.standing[name] = place


def _copied(config: PeftConfig) -> PeftConfig:
    made = copy.deepcopy(config)
    made.inference_mode = True
    return made
