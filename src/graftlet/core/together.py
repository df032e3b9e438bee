# SPDX-License-Identifier: Apache-2.0
"""A layer's adapters in inference: one alone, or a mixed batch of several, as one computation kept from call to call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..weights.product import watched
from .context import Call
from .group import Group
from .host import AdapterHost
from .kernel import capturing, kernels, untouched
from .lasting import Guard, LastFound, LastMade, steps
from .method import Delta, Method, Spec, Stage, View
from .settled import Lean, Settled
from .tensors import Common

if TYPE_CHECKING:
    from ..weights.site import Site


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


def settles(kind: type[Method]) -> bool:
    """Whether methods of a kind may ever be two thin products, maybe with a gain."""
    return kind.thin is not Method.thin or kind.settled not in (Method.settled, Delta.settled)


class Together(AdapterHost):
    """A layer that keeps what it computes with its adapters."""

    if TYPE_CHECKING:
        methods: dict[str, Method]
        settings: dict[str, list[str]]
        commons: dict[str, dict[str, Common]]
        site: Site
        cast_input_dtype_enabled: bool
        _reads: dict[str, list[tuple[str, str, str | None, Spec]]]

        def view(self, name: str, dtype: torch.dtype | None = None) -> View: ...

        def _first_stage(self) -> Stage: ...

        def call_base(self, x: Tensor) -> Tensor: ...

    def __init__(self) -> None:
        super().__init__()
        self._groups: LastMade[Group | None] = LastMade()
        self._lone: LastMade[Settled | None] = LastMade()
        self._lean: LastFound[Lean | None] = LastFound()

    def _unsettle(self) -> None:
        """Keep nothing of what was made of the tensors so far."""
        for kept in (self._groups, self._lone, self._lean):
            kept.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._unsettle()  # it would hold the memory that the tensors leave
        return super()._apply(fn, recurse)

    # one alone

    def _by_itself(self, name: str, x: Any) -> Tensor | None:
        """The output with one adapter, where it is the layer's own and two thin products; else None."""
        method, learns = self.methods[name], torch.is_grad_enabled()
        if not settles(type(method)) or (method.derives and (learns or name in self._learning)):
            return None
        if torch.compiler.is_compiling() or watched(self.site.module) or not kernels():
            return None
        return (self._in_training if learns else self._in_inference)(name, x)

    def _in_inference(self, name: str, x: Any) -> Tensor | None:
        """In inference."""
        if not untouched(x) or capturing(x.device):  # a graph would not see what is written into the adapter
            return None

        learns = name in self._learning

        def make() -> Settled | None:
            found = self.methods[name].settled(self.view(name), self._first_stage())
            if found is None or not (self.cast_input_dtype_enabled or found.A.dtype == x.dtype):
                return None
            if learns:  # an optimiser may write in ways that leave no trace, so its own tensors are read in each call
                return found if found.gain is None else None
            return found.ready(x.dtype)

        key = (name, x.dtype, learns, self.training, self.cast_input_dtype_enabled)
        settled = self._lone.get(key, x.device, lambda: self._over((name,)), make)
        return None if settled is None else settled.on(x, self.call_base)

    def _in_training(self, name: str, x: Any) -> Tensor | None:
        """In training: what there is to find out about the layer is found out once."""
        if not isinstance(x, Tensor):
            return None

        def make() -> Lean | None:
            return self.methods[name].lean(self.view(name), self._first_stage())

        key = (name, self.training, self.cast_input_dtype_enabled)
        run = self._lean.get(key, x.device, lambda: self._over((name,)), make)
        if run is None or any(p is not None and p.requires_grad for p in self.site.module._parameters.values()):
            return None
        return run(x)

    # several in a batch

    def _together(self, call: Call, x: Tensor, whole: Stage) -> Tensor | None:
        """A mixed batch whose adapters are computed all at once; None where their method cannot do that."""
        names = call.served(self.methods)
        group = self._grouped(names, x, whole) if len(names) > 1 and x.is_floating_point() else None
        if group is None:
            return None
        count = x.shape[0]  # tensors' `len` is slow
        rows, owner = call.which(names, count, x.device)
        every = rows.shape[0] == count
        if every and group.lean(x):
            return group.on(x, owner, whole, whole.product)
        y = whole(x)

        def plain() -> Tensor:
            own, b = y if every else y.index_select(0, rows), whole.bias()
            return own if b is None else own - b

        added = group.added(x if every else x.index_select(0, rows), owner, plain)
        wide = y.to(torch.promote_types(y.dtype, added.dtype))
        return (wide + added if every else wide.index_add(0, rows, added.to(wide.dtype))).to(y.dtype)

    def _grouped(self, names: tuple[str, ...], x: Tensor, whole: Stage) -> Group | None:
        """Adapters as one computation, kept from call to call while nothing that they are made from has changed."""

        def make() -> Group | None:
            if self.site.opaque or len({type(self.methods[name]) for name in names}) > 1:
                return None
            return self.methods[names[0]].grouped([self.view(name) for name in names], whole)

        key = (names, self.training, self.cast_input_dtype_enabled)
        return self._groups.get(key, x.device, lambda: self._over(names), make)

    # what it is made from

    def _over(self, names: tuple[str, ...]) -> list[Guard] | None:
        """Guards over all that adapters and the layer are read from; None where that stands in no dictionary."""
        weight = steps(self.site.module, self.site.name)
        bias = steps(self.site.module, self.site.bias) if self.site.has_bias and self.site.bias else []
        parts = [weight, bias, *(part for name in names for part in self._guards(name))]
        return None if None in parts else [guard for part in parts for guard in part or ()]

    def _guards(self, name: str) -> Iterator[list[Guard] | None]:
        """Over all that an adapter's view is made from."""
        yield [(self.methods, name, self.methods[name])]
        for key in self.settings[name]:
            held = self.__dict__.get(key)
            if held is not None:
                yield [(held, name, held[name])]
            else:
                yield steps(self._modules[key], name)
                own = self._modules[key][name]  # type: ignore[index]
                if type(own) is not nn.Identity:  # dropout that has been turned off
                    yield [
                        (own.__dict__, entry, own.__dict__[entry])
                        for entry in ("training", "p")
                        if entry in own.__dict__
                    ]
        for _, box, entry, _ in self._reads[name]:
            yield steps(self, box, name, *([] if entry is None else entry.split(".", 1)))
        for common in self.commons.get(name, {}).values():
            for entry in common.specs[name]:
                yield steps(common, name, *([entry] if entry else []))
