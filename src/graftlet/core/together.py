# SPDX-License-Identifier: Apache-2.0
"""A layer's adapters among each other: a mixed batch of several as one computation, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .context import Call
from .group import Group
from .host import AdapterHost
from .method import Method, Spec, Stage, View
from .tensors import Common

if TYPE_CHECKING:
    from ..weights.site import Site


class LastGroup:
    """The group that a layer used last, for as long as all that it was made from is the same.

    It is kept in inference alone. What it was made from is known by place and version, so it does not see what is written
    through a tensor's `.data`. A copy of a layer starts without.
    """

    def __init__(self) -> None:
        self._held: tuple[list[Any], list[Any], Group] | None = None

    def clear(self) -> None:
        """Forget it."""
        self._held = None

    def get(self, sources: list[Any], make: Callable[[], Group | None]) -> Group | None:
        """The group of these sources (tensors, and plain values that are compared), made where it is not at hand."""
        idle = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if idle or any(isinstance(s, Tensor) and s.is_inference() for s in sources):
            return make()
        held, marks = self._held, [_mark(s) for s in sources]
        if held is not None and held[1] == marks:
            return held[2]
        made = make()
        kept = [s.detach() for s in sources if isinstance(s, Tensor)]  # so that no other tensor comes to their places
        self._held = None if made is None else (kept, marks, made)
        return made

    def __deepcopy__(self, memo: Any) -> LastGroup:
        return LastGroup()

    def __reduce__(self) -> tuple[type[LastGroup], tuple[()]]:
        return LastGroup, ()


def _mark(source: Any) -> Any:
    if isinstance(source, Tensor):
        return (source.data_ptr(), source._version, source.dtype, source.shape)
    return source


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

        def plain() -> Tensor:
            own, b = y if every else y.index_select(0, rows), whole.bias()
            return own if b is None else own - b

        added = group.added(x if every else x.index_select(0, rows), owner, plain)
        wide = y.to(torch.promote_types(y.dtype, added.dtype))
        return (wide + added if every else wide.index_add(0, rows, added.to(wide.dtype))).to(y.dtype)

    def _group(self, names: tuple[str, ...], whole: Stage) -> Group | None:
        """Adapters as one computation, kept from call to call while nothing that they are made from has changed."""
        method = self.methods[names[0]]

        def make() -> Group | None:
            return method.grouped([self.view(name) for name in names], whole)

        sources: list[Any] = [names, self.training, self.cast_input_dtype_enabled, self.site.weight]
        for name in names:
            sources += self._sources(name)
        return self._last.get(sources, make)

    def _sources(self, name: str) -> Iterator[Any]:
        """All that an adapter's view is made from."""
        boxes: dict[str, Any] = self._modules
        yield self.methods[name]
        for key in self.settings[name]:
            yield self.__dict__[key][name] if key in self.__dict__ else boxes[key][name]
        for _, box, entry, _ in self._reads[name]:
            held = boxes[box][name]
            yield held if entry is None else held[entry]
        for common in self.commons.get(name, {}).values():
            yield from common.tensors(name).values()
