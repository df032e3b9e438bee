# SPDX-License-Identifier: Apache-2.0
"""A layer's adapters among each other: a mixed batch of several as one computation, kept from call to call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .context import Call
from .group import Group
from .host import AdapterHost
from .kernel import capturing
from .method import Method, Spec, Stage, View
from .tensors import Common

if TYPE_CHECKING:
    from ..weights.site import Site


Guard = tuple["dict[str, Any]", str, Any]
"""A dictionary, a key, and what stood there."""


class Held:
    """A group, and what it was made from: for whom, where things stood, and which version the tensors among them had."""

    def __init__(self, key: tuple[Any, ...], guards: list[Guard], group: Group) -> None:
        self.key, self.group = key, group
        once = {(id(place), name): (place, name, value) for place, name, value in guards}.values()
        self.places, self.names, self.values = map(list, zip(*once, strict=True))
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        self.marks = self._marks()

    def good(self, key: tuple[Any, ...]) -> bool:
        """Whether all of it is as it was. Asked by every layer in every call: no loop of it is Python's own."""
        same = key == self.key and all(map(operator.is_, map(dict.get, self.places, self.names), self.values))
        return same and self._marks() == self.marks

    def _marks(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self.tensors)), list(map(Tensor.data_ptr, self.tensors))


_version = operator.attrgetter("_version")


class LastGroup:
    """The group that a layer used last, for as long as all that it was made from is the same.

    It is kept in inference alone. What it was made from is known by place and version, so it does not see what is written
    through a tensor's `.data`. A copy of a layer starts without. One that a CUDA graph reads is kept until the layer's
    adapters are others, as the graph itself keeps no memory that was there before it.
    """

    def __init__(self) -> None:
        self._held: Held | None = None
        self._read: dict[int, Group] = {}

    def clear(self) -> None:
        """Forget it."""
        self._held, self._read = None, {}

    def get(
        self, key: tuple[Any, ...], guards: Callable[[], list[Guard] | None], make: Callable[[], Group | None]
    ) -> Group | None:
        """The group at hand, or a new one; it is kept where guards can be set over what it is made from."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if self._held is not None and self._held.good(key):
            if capturing(self._held.group.A.device):
                self._read[id(self._held.group)] = self._held.group
            return self._held.group
        self._held, group = None, make()
        over = guards() if group is not None else None
        lasting = over is not None and not any(isinstance(v, Tensor) and v.is_inference() for _, _, v in over)
        if group is not None and over is not None and lasting:
            self._held = Held(key, over, group)
        return group

    def __deepcopy__(self, memo: Any) -> LastGroup:
        return LastGroup()

    def __reduce__(self) -> tuple[type[LastGroup], tuple[()]]:
        return LastGroup, ()


def steps(place: Any, *path: str) -> list[Guard] | None:
    """The way from a module to what it holds, a guard a step; None where it holds that in no dictionary of its own."""
    found: list[Guard] = []
    for name in path:
        within = (d for d in (place._parameters, place._modules, place._buffers) if name in d)
        if (where := next(within, None)) is None:
            return None
        found.append((where, name, where[name]))
        place = where[name]
    return found


class Peers(Mapping[str, tuple[Method, View]]):
    """The adapters of a layer by name, each with its method and its view, which is made when it is asked for."""

    def __init__(self, layer: Together) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> tuple[Method, View]:
        return self._layer.methods[name], self._layer.view(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.methods)

    def __len__(self) -> int:
        return len(self._layer.methods)


class Together(AdapterHost):
    """A layer that can compute several of its adapters at once."""

    if TYPE_CHECKING:
        methods: dict[str, Method]
        settings: dict[str, list[str]]
        commons: dict[str, dict[str, Common]]
        site: Site
        cast_input_dtype_enabled: bool
        _reads: dict[str, list[tuple[str, str, str | None, Spec]]]

        def view(self, name: str, dtype: torch.dtype | None = None) -> View: ...

    def __init__(self) -> None:
        super().__init__()
        self._last = LastGroup()

    def _together(self, call: Call, groups: list[tuple[str, Tensor]], x: Tensor, whole: Stage) -> Tensor | None:
        """A mixed batch whose adapters are computed all at once; None where their method cannot do that."""
        names = tuple(name for name, _ in groups if name in self.methods)
        kinds = {type(self.methods[name]) for name in names}
        if len(names) < 2 or len(kinds) > 1 or self.site.opaque:
            return None
        group = self._group(names, whole) if x.is_floating_point() else None
        if group is None:
            return None
        rows, owner = call.which(names, len(x), x.device)
        every, y = len(rows) == len(x), whole(x)
        if every and group.lean(x, y):
            return group.added_to(y, x, owner)

        def plain() -> Tensor:
            own, b = y if every else y.index_select(0, rows), whole.bias()
            return own if b is None else own - b

        added = group.added(x if every else x.index_select(0, rows), owner, plain)
        wide = y.to(torch.promote_types(y.dtype, added.dtype))
        return (wide + added if every else wide.index_add(0, rows, added.to(wide.dtype))).to(y.dtype)

    def _group(self, names: tuple[str, ...], whole: Stage) -> Group | None:
        """Adapters as one computation, kept from call to call while nothing that they are made from has changed."""

        def make() -> Group | None:
            return self.methods[names[0]].grouped([self.view(name) for name in names], whole)

        def guards() -> list[Guard] | None:
            parts = [steps(self.site.module, self.site.name), *(part for name in names for part in self._guards(name))]
            return None if None in parts else [guard for part in parts for guard in part or ()]

        return self._last.get((names, self.training, self.cast_input_dtype_enabled), guards, make)

    def _guards(self, name: str) -> Iterator[list[Guard] | None]:
        """Over all that an adapter's view is made from."""
        yield [(self.methods, name, self.methods[name])]
        for key in self.settings[name]:
            held = self.__dict__.get(key)
            yield steps(self._modules[key], name) if held is None else [(held, name, held[name])]
        for _, box, entry, _ in self._reads[name]:
            yield steps(self, box, name, *([] if entry is None else entry.split(".", 1)))
        for common in self.commons.get(name, {}).values():
            for entry in common.specs[name]:
                yield steps(common, name, *([entry] if entry else []))
