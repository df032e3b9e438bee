# SPDX-License-Identifier: Apache-2.0
"""The tensors of a merged model, one by one, in the memory of one layer and one adapter.

The model is made without memory. Each of its tensors is read from the base's files as its turn comes, and merged where the
adapter stands on it. A layer is given what it would have after a load in memory, in the same order, for as long as that takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import state
from ..core.host import AdapterHost, hosts
from ..core.layer import AdaptedLayer
from ..core.lifecycle import relink
from ..core.merging import exactly
from ..core.replication import replicate, tied_after
from ..core.state import Slot
from ..core.tensors import Common, as_held, attribute
from ..core.ties import tied
from ..errors import AdapterFileError, MergeError, UnsupportedOptionError
from ..registry import lookup
from . import embeddings, save
from .base_files import BaseFiles, keys_of
from .peft_model import PeftModel

NAME = "default"


class Merged:
    """A saved adapter merged into a saved base. Arguments and errors are those of `shards.Merge`.

    Attributes:
        state: the merged model's tensors by key, on meta. tied: the keys of those that are one in the base.
        parted: those of them that no longer are.
    """

    def __init__(self, base: Path, adapter: str, skeleton: Any, device: str) -> None:
        self.adapter, self.skeleton, self.device = adapter, skeleton, device
        self.config = PeftConfig.from_pretrained(adapter)
        self._check()
        self.base = BaseFiles(base, skeleton, device)
        replicate(skeleton, self.config.layer_replication, adapted=False)
        self.state: dict[str, Tensor] = dict(skeleton.state_dict(keep_vars=True))
        self.dtypes = {k: t.dtype for k, t in self.state.items()}
        self.modules = {id(module): path for path, module in skeleton.named_modules()}
        self.tied = keys_of(tied_after(skeleton))
        self.tensors = save.load_peft_weights(adapter, device)
        state.check_finite(self.tensors, adapter)
        self.brought: dict[str, Tensor] = {}  # the base's own that stand in the adapter's file: embeddings, biases
        self.movers: dict[str, AdaptedLayer] = {}  # of tensors that layers share: whose start has the last word on them
        self.paths: dict[AdapterHost, str] = {}
        self.owners = self._owners()
        self._check_whole()
        self.homes = self._homes()
        self._made: dict[str, Tensor] = {}
        self.parted = [keys for keys in self.tied if not self._alike(keys)]

    def _check(self) -> None:
        if why := lookup(self.config.peft_type).method.unmergeable:
            raise MergeError(f"{self.config.peft_type} adapters cannot be merged: {why}.")
        if len(dict(self.skeleton.named_modules(remove_duplicate=False))) > len(list(self.skeleton.modules())):
            raise UnsupportedOptionError("the model uses a module in several places")

    def _check_whole(self) -> None:
        """Raise where a tensor is neither in the base's files nor in the adapter's."""
        given = {k for k, host in self.owners.items() if not isinstance(host, AdaptedLayer)} | self.brought.keys()
        if lacking := [k for k in self.base.lacking if k not in given]:
            raise UnsupportedOptionError(f"the base's files lack {lacking[0]}")

    def _owners(self) -> dict[str, AdapterHost]:
        """The layers, by the key of each tensor that merging may change."""
        model = PeftModel(self.skeleton, self.config, NAME, low_cpu_mem_usage=True, _init=False)
        self.paths = {host: path for path, host in hosts(model)}
        there = state.placed(model, NAME)
        wanted = state.slots(model, NAME, self.config, self.tensors, there)
        self.tensors = embeddings.without_levels(self.tensors, wanted, NAME)
        given = state.unpacked(there, NAME, self.tensors)
        whole = embeddings.slots(embeddings.embedding_weights(model), given)
        if complaints := state.fit({**wanted, **whole}, given).complaints():
            raise AdapterFileError(f"{self.adapter} does not fit the base: {'; '.join(complaints)}.")
        brought = {id(s.tensor): given[k] for k, s in {**wanted, **whole}.items() if s.host is None}
        self.brought = {key: brought[id(t)] for key, t in self.state.items() if id(t) in brought}
        self.movers = self._movers(model)
        self._share(model, {k: slot for k, slot in wanted.items() if isinstance(slot.host, Common)}, given)
        owners: dict[str, AdapterHost] = {}
        for host in self.paths:
            if isinstance(host, AdaptedLayer):
                if why := host.methods[NAME].unmergeable:
                    raise MergeError(f"the adapter cannot be merged: {why}.")
                owners.update({self._key(host.site.module, name): host for name in _names(host)})
            else:
                owners.update({self._key(host.base, name): host for name in host.base.state_dict()})
        return owners

    def _share(self, model: PeftModel, wanted: dict[str, Slot], given: dict[str, Tensor]) -> None:
        """What all layers of the adapter share is made once, and stays; layers' weights are read for it one by one."""
        tuner = model.tuner
        if tuner is not None and tuner.pending is not None and tuner.pending[0].commons:
            tuner.pending[0].share_on(self.device)
            state.fill(wanted, given, NAME)
            relink(tuner.model, NAME)

    def _movers(self, model: PeftModel) -> dict[str, AdaptedLayer]:
        """The last layer whose start may take something out of a weight that layers share, by each key of that."""
        groups, movers = {key: keys for keys in keys_of(tied(self.skeleton)) for key in keys}, dict[str, AdaptedLayer]()
        items = model.tuner.pending[0].items if model.tuner is not None and model.tuner.pending is not None else ()
        for layer in [i.host for i in items if isinstance(i.host, AdaptedLayer)]:
            if layer.methods[NAME].derived(layer.configs[NAME]):
                keys = groups.get(self._key(layer.site.module, layer.site.name), [])
                movers.update(dict.fromkeys(keys, layer))
        return movers

    def _homes(self) -> dict[AdapterHost, str]:
        """Where the tensors of each layer stand in the file: once, where layers share them."""
        first: dict[int, str] = {}
        for host, path in self.paths.items():
            for tensor in host.state(NAME).values():
                first.setdefault(id(tensor), path)
        return {
            h: next((first.get(id(t), path) for t in h.state(NAME).values()), path) for h, path in self.paths.items()
        }

    def _key(self, module: nn.Module, name: str) -> str:
        """The key in the model of a tensor of one of its modules."""
        path = self.modules[id(module)]
        return f"{path}.{name}" if path else name

    def _alike(self, keys: list[str]) -> bool:
        """Whether places that share a tensor still do after merging."""
        if not any(key in self.owners for key in keys):
            return True
        first, *rest = [self._result(key) for key in keys]
        return all(t.equal(first) for t in rest)

    @torch.no_grad()
    def tensor(self, key: str) -> Tensor:
        """One tensor of the merged model. Raises `MergeError` where it is not finite."""
        if key not in self._made and isinstance(layer := self.owners.get(key), AdaptedLayer):
            self._made = self._merged(layer)  # a weight, and the bias that comes after it
        return self._made.pop(key) if key in self._made else self._result(key)

    @torch.no_grad()
    def _result(self, key: str) -> Tensor:
        host = self.owners.get(key)
        if host is None:
            return self.read(key)
        if isinstance(host, AdaptedLayer):
            return self._merged(host)[key]
        copies = {
            self._key(host.base, name): f"{self.paths[host]}.{own}"
            for own, name in zip(host.state(NAME), host.base.state_dict(), strict=True)
        }
        return self.tensors[copies[key]].to(self.dtypes[key])

    def _merged(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        site, leaders = layer.site, layer.leaders(NAME)
        keys = [self._key(site.module, name) for name in _names(layer)]
        with ExitStack() as filled, exactly(torch.device(self.device)):
            filled.enter_context(self._filled(layer, adapter=not leaders))
            for leader in leaders:
                filled.enter_context(self._filled(leader))
            W, b = layer.merged_weight([NAME])
            site.accepts(W)
            made = dict(zip(keys, [site.kept(W), b], strict=False))
        if b is not None and len(keys) < 2:
            raise MergeError(f"the adapter changes the bias of {self.paths[layer]}, which has none.")
        if bad := [k for k, t in made.items() if t is not None and not t.isfinite().all()]:
            raise MergeError(f"merging would write NaN or Inf into {bad[0]}.")
        return {k: t.to("cpu", self.dtypes[k]).contiguous() for k, t in made.items() if t is not None}

    def read(self, key: str) -> Tensor:
        """One tensor of the base, as the model has it in memory once the adapter is loaded."""
        if key in self.movers and (moved := self._moved(self.movers[key])) is not None:
            return moved.to(self.dtypes[key])
        if key in self.brought:
            return self.brought[key].to(self.dtypes[key], copy=True)
        return self.base.read(self.state[key])

    def _moved(self, layer: AdaptedLayer) -> Tensor | None:
        """The weight that a layer's start leaves in the base, as it is kept; None where that is the base's own."""
        with self._with_weights(layer):
            rebased = self._started(layer)[1]
            return None if rebased is None else layer.site.kept(rebased)

    @contextmanager
    def _with_weights(self, layer: AdaptedLayer) -> Iterator[dict[str, str]]:
        """Let a layer have the base's weights for a while. Gives their keys in the model, by name."""
        held = layer.site.module._parameters
        keys = {name: self._key(layer.site.module, name) for name in _names(layer)}
        before = {name: held[name] for name in keys}
        try:
            held.update({n: nn.Parameter(self.base.read(self.state[key]), False) for n, key in keys.items()})
            yield keys
        finally:
            held.update(before)

    @contextmanager
    def _filled(self, layer: AdaptedLayer, adapter: bool = True) -> Iterator[None]:
        """Let a layer have its tensors, and its adapter's, for a while: in the order of a load in memory."""
        before = {n: layer.tensor(NAME, n) for n in layer.specs[NAME]} if adapter else {}
        with self._with_weights(layer) as keys:
            try:
                made, rebased = self._started(layer) if adapter else ({}, None)
                for name, key in keys.items():
                    if key in self.brought or key in self.movers:
                        layer.site.module._parameters[name] = nn.Parameter(self.read(key), False)
                if rebased is not None and keys[layer.site.name] not in self.movers:
                    layer.site.write(rebased, None)
                if adapter:
                    self._fill(layer, made)
                yield
            finally:
                for name, tensor in before.items():
                    layer.put(NAME, name, tensor, layer.specs[NAME][name])

    def _started(self, layer: AdaptedLayer) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a layer's method makes of the weight, where the file has not all: its tensors, and a new base weight."""
        method = layer.methods[NAME]
        if not method.derived(layer.configs[NAME]):
            return {}, None
        held = {name: layer.tensor(NAME, name) for name in layer.specs[NAME]}
        made = {n: torch.empty_like(t, device=self.device, requires_grad=False) for n, t in held.items()}
        return made, method.init(layer.view(NAME).over({attribute(n): t for n, t in made.items()}))

    def _fill(self, layer: AdaptedLayer, made: dict[str, Tensor]) -> None:
        """Let a layer have what its method made, what the adapter's file has for it, and what follows from that."""
        for name, tensor in made.items():
            layer.put(NAME, name, as_held(tensor, layer.specs[NAME][name]), layer.specs[NAME][name])
        method, path = layer.methods[NAME], self.homes[layer]
        given = {k[len(path) + 1 :]: t for k, t in self.tensors.items() if k.startswith(f"{path}.")}
        for key, tensor in layer.unpack(NAME, given).items():
            if key in layer.state(NAME):
                layer.assign(NAME, key, tensor)
        method.link({layer.keys[NAME]: layer}, NAME)


def _names(layer: AdaptedLayer) -> list[str]:
    """What a layer's weight is called in its module, and its bias where it has one."""
    return [layer.site.name, *([layer.site.bias] if layer.site.has_bias and layer.site.bias else [])]
