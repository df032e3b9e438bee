# SPDX-License-Identifier: Apache-2.0
"""An adapter's tensors out of a model and into one.

Keys are the structure without its adapter level: the path of the wrapper, then the tensor's name in the file. No key is
made by cutting text out of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import AdapterFileError, listing
from ..weights.rounding import finite_each
from ..weights.site import Parameter
from ..weights.whole import shape_of
from .host import AdapterHost, Shell, commons, hosts, modules
from .layer import AdaptedLayer
from .lifecycle import biases
from .tensors import Common


@dataclass(frozen=True)
class Slot:
    """Where one tensor of an adapter belongs: a host's, or a parameter of the base that the adapter trains."""

    tensor: Tensor
    host: AdapterHost | Common | None = None
    key: str = ""


@dataclass
class Fit:
    """How a file's tensors fit a model's slots."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """A sentence for each kind of misfit."""
        kinds = {
            "missing": self.missing,
            "not part of this adapter": self.unexpected,
            "of another shape": self.misshaped,
            "of another kind": self.mistyped,
        }
        return [f"{len(keys)} {kind}: {listing(keys, 4)}" for kind, keys in kinds.items() if keys]


Placed = list[tuple[str, AdapterHost]]
"""The wrappers that an adapter is on, with their paths in its file."""


def slots(
    model: nn.Module,
    adapter: str,
    config: PeftConfig | None = None,
    given: Iterable[str] = (),
    there: Placed | None = None,
) -> dict[str, Slot]:
    """All that an adapter's file holds, by key; of what other writers put into it besides, what is `given`.

    there: what `placed` says, where that is known.
    """
    found: dict[str, Slot] = {}
    for path, host, held in _saved_hosts(model, adapter, frozenset(given), there):
        found.update({f"{path}.{key}": Slot(tensor, host, key) for key, tensor in held.items()})
    for path, box in commons(model):
        for entry, tensor in box.tensors(adapter).items():
            if box.specs[adapter][entry].saved:
                found[f"{path}.{entry}" if entry else path] = Slot(tensor, box, entry)
    if config is not None:
        found.update({path: Slot(bias) for path, bias in biases(model, config, adapter).items()})
    return found


def placed(model: nn.Module, adapter: str) -> Placed:
    """The wrappers that an adapter is on, with their paths in its file: as if it were alone in the model.

    Those of one module's parameters then stand inside each other in the model's order, whatever their order is here.
    """
    found = [(path, host) for path, host in hosts(model, adapter) if adapter in host.adapters]
    together: dict[int, list[int]] = {}
    for i, (_, host) in enumerate(found):
        if isinstance(host, AdaptedLayer) and isinstance(host.site, Parameter):
            together.setdefault(id(host.site.module), []).append(i)
    for places in together.values():
        held = sorted((cast(AdaptedLayer, found[i][1]) for i in places), key=_rank, reverse=True)
        for i, host in zip(places, held, strict=True):
            found[i] = (found[i][0], host)
    return found


def _rank(layer: AdaptedLayer) -> int:
    """Which of its module's parameters a layer is on."""
    return list(layer.site.module._parameters).index(cast(Parameter, layer.site).name)


def _saved_hosts(
    model: nn.Module, adapter: str, given: frozenset[str] = frozenset(), there: Placed | None = None
) -> Iterator[tuple[str, AdapterHost, dict[str, Tensor]]]:
    """The wrappers that stand in an adapter's file, with its tensors: rows of tokens that layers share stand there once."""
    inner = {id(m.inner) for m in modules(model) if isinstance(m, Shell)}
    seen: set[int] = set()
    for path, host in placed(model, adapter) if there is None else there:
        held = host.state(adapter)
        tensors = {id(t) for t in held.values()}
        again = id(host) in inner and tensors <= seen
        if tensors and not (again and not any(f"{path}.{key}" in given for key in held)):
            yield path, host, held
        seen |= tensors


def collect(model: nn.Module, adapter: str, config: PeftConfig | None = None) -> dict[str, Tensor]:
    """An adapter's tensors by their key in the file."""
    found: dict[str, Tensor] = {}
    for path, host, _ in _saved_hosts(model, adapter):
        found.update({f"{path}.{key}": tensor for key, tensor in host.pack(adapter).items()})
    others = {
        key: slot for key, slot in slots(model, adapter, config).items() if not isinstance(slot.host, AdapterHost)
    }
    return {**found, **{key: slot.tensor for key, slot in others.items()}}


def unpacked(there: Placed, adapter: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors as the layers hold them. there: what `placed` says."""
    by_path: dict[str, dict[str, Tensor]] = {}
    paths = {path for path, _ in there}
    rest: dict[str, Tensor] = {}
    for key, tensor in given.items():
        path = _owner(key, paths)
        (rest if path is None else by_path.setdefault(path, {}))[key if path is None else key[len(path) + 1 :]] = tensor
    for path, host in there:
        if path in by_path:
            held = host.unpack(adapter, by_path[path])
            rest.update({f"{path}.{key}": tensor for key, tensor in held.items()})
    return rest


def _owner(key: str, paths: set[str]) -> str | None:
    """The longest path that a key stands below."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in paths:
            return key
    return None


def fit(wanted: Mapping[str, Slot], given: Mapping[str, Tensor]) -> Fit:
    """Compare a file's tensors (real, or on meta from its header) with the slots they should fill."""
    report = Fit([k for k in wanted if k not in given], [k for k in given if k not in wanted])
    for key in wanted.keys() & given.keys():
        theirs, ours = given[key], wanted[key].tensor
        if theirs.shape != (shape := shape_of(ours)):
            report.misshaped.append(f"{key} {tuple(theirs.shape)}, not {tuple(shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
            report.mistyped.append(f"{key} {theirs.dtype}, not {ours.dtype}")
    report.misshaped.sort()
    report.mistyped.sort()
    return report


@torch.no_grad()
def fill(wanted: Mapping[str, Slot], given: Mapping[str, Tensor], adapter: str) -> None:
    """Put given tensors into the slots of the same keys, on the slots' devices and in their dtypes."""
    for key in wanted.keys() & given.keys():
        slot = wanted[key]
        if slot.host is None:
            slot.tensor.copy_(given[key])
        else:
            slot.host.assign(adapter, slot.key, given[key])


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise `AdapterFileError` where a tensor holds NaN or Inf."""
    if bad := unfinite(tensors):
        raise AdapterFileError(f"{origin} holds {bad[0]}; it is damaged.")


def unfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """A sentence on the tensors that hold NaN or Inf, if any do."""
    floating = {key: _widened(t) for key, t in tensors.items() if t.is_floating_point()}
    bad = [key for key, good in zip(floating, finite_each(floating.values()), strict=True) if not good]
    return [f"NaN or Inf in {len(bad)} tensors: {listing(bad, 4)}"] if bad else []


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def check_loaded(model: nn.Module, adapter: str, origin: str) -> None:
    """Raise `AdapterFileError` where a loaded tensor holds what it must not: places that are none, for instance."""
    for path, host in hosts(model):
        try:
            host.check_loaded(adapter)
        except AdapterFileError as error:
            raise AdapterFileError(f"{origin}, {path}: {error.args[0]}") from None
