# SPDX-License-Identifier: Apache-2.0
"""What a piece of torch code takes, weighed while it runs on tensors without data: memory by the life of every storage,
and for each operation how many numbers it multiplies and how many bytes it moves.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BLOCKS = {"cuda": 512}
"""What an allocator rounds every size up to a multiple of."""


@dataclass
class Held:
    """One storage. born, died: when, in events; kind: what it is, where that is known; again: made in backward by a
    forward that is run again.
    """

    size: int
    born: int
    phase: str
    kind: str = ""
    again: bool = False
    died: int | None = None
    ended: str = ""


@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations of its product, if it is one, in `dtype`; bytes read and written."""

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype | None
    phase: str


@dataclass(frozen=True)
class Peak:
    """The most memory that was held at once, and what it was, in bytes by kind."""

    total: int
    parts: Counter[str]
    phase: str


@dataclass
class Ledger(TorchDispatchMode):
    """Everything that is allocated while this mode is on, in the order in which it comes and goes.

    kind: of the device that it is for. wide: tensors with a last dimension of this size or more are logits. says: what a
    condition on numbers that are not there comes to. whole: what is chosen by numbers that are not there is all there is.
    """

    kind: str = "cpu"
    wide: int = 0
    says: bool = True
    whole: bool = False
    phase: str = "start"
    now: int = 0
    held: list[Held] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, Held] = {}

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.says if args[0].dtype == torch.bool else 0
        kwargs = kwargs or {}
        if self.whole:
            func, args = _choosing_all(func, args)
        made = run(func, args, kwargs)
        results = list(tensors_in(made))
        fresh = [t for t in results if self.note(t)]
        if (fresh or func._schema.is_mutable) and "empty" not in func._schema.name:
            self._count(func, results, args, kwargs, made)
        return made

    def note(self, tensor: Tensor, kind: str = "") -> bool:
        """Take a tensor's storage into the books; whether it is new there."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self._known.get(key)) is not None:
            known.kind = kind if known.kind in ("", "logits") and kind else known.kind
            return False
        block = BLOCKS.get(self.kind, 1)
        size = -(-storage.nbytes() // block) * block
        if not kind and tensor.dim() > 1 and self.wide and tensor.shape[-1] >= self.wide and len(tensor.shape) < 4:
            kind = "logits"
        again = self.phase == "backward" and torch.is_grad_enabled()
        self.now += 1
        entry = Held(size, self.now, self.phase, kind, again)
        self.held.append(entry)
        self._known[key] = entry
        weakref.finalize(storage, self._gone, key, entry)
        return True

    def _gone(self, key: int, entry: Held) -> None:
        self.now += 1
        entry.died, entry.ended = self.now, self.phase
        self._known.pop(key, None)

    def note_all(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Take tensors in, or say of those that are in already what they are."""
        for tensor in tensors:
            if tensor is not None:
                self.note(tensor, kind)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens inside belongs to this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def _count(self, func: Any, results: list[Tensor], args: tuple, kwargs: dict, made: Any) -> None:
        rule = _rule(func)
        flops = int(rule(*args, **kwargs, out_val=made)) if rule is not None else 0
        given = [*tensors_in(args), *tensors_in(kwargs)]
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*given, *results]}.values())
        self.work.append(Work(str(func._overloadpacket), flops, moved, given[0].dtype if given else None, self.phase))

    def counted(self, name: str, flops: int, moved: int, dtype: torch.dtype) -> None:
        """Put down the work of a kernel that does not run here."""
        self.work.append(Work(name, flops, moved, dtype, self.phase))

    def peak(self, phases: Iterable[str] | None = None) -> Peak:
        """The most that was held at once, in these phases or ever."""
        among = None if phases is None else set(phases)
        events = sorted(
            [(h.born, h.size, h.phase) for h in self.held]
            + [(h.died, -h.size, h.ended) for h in self.held if h.died is not None]
        )
        total = most = at = 0
        phase = ""
        for when, change, within in events:
            total += change
            if total > most and (among is None or within in among):
                most, at, phase = total, when, within
        parts = Counter[str]()
        for h in self.held:
            if h.born <= at and (h.died is None or h.died > at):
                parts[h.kind or _kind(h)] += h.size
        return Peak(most, parts, phase)


def _kind(entry: Held) -> str:
    """What is made in a forward and kept for backward is an activation; the rest is there for a moment."""
    kept = entry.phase == "forward" and entry.ended == "backward"
    return "activations" if kept or entry.again else "workspace"


def parts_of(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a model, those included that are in no state dict."""
    return [*model.parameters(), *model.buffers()]


@functools.cache
def _rule(func: Any) -> Any:
    """How the operations of a product are counted, whether or not it is written into its first argument."""
    packet = func._overloadpacket
    name = packet.__name__.removesuffix("_")
    return flop_registry.get(packet) or flop_registry.get(getattr(torch.ops.aten, name, None))


def _choosing_all(func: Any, args: tuple) -> tuple[Any, tuple]:
    """A choice by conditions on numbers that are not there, as if they held for all."""
    aten = torch.ops.aten
    if func is aten.nonzero.default and args[0].is_meta:
        return aten.new_empty.default, (args[0].to(torch.long), [args[0].numel(), args[0].dim()])
    if func is aten.index.Tensor and args[0].is_meta:
        return func, (args[0], [place for index in args[1] for place in _places(index)])
    return func, args


def _places(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long, device=index.device) for _ in range(index.dim())]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


_shapes: dict[Any, Any] = {}
_SEVERAL = 20_000


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """What an operation makes of tensors without data; found once for all that are alike, since layers are."""
    if _changes(func) and args and isinstance(args[0], Tensor) and args[0].is_meta:
        return args[0]  # changed in place: of the same shape as before
    key = _key(func, args, kwargs) if _pure(func) else None
    if key is None:
        return func(*args, **kwargs)
    if (made := _shapes.get(key)) is None:
        found = func(*args, **kwargs)
        if isinstance(found, Tensor) and found.is_meta and len(_shapes) < _SEVERAL:
            _shapes[key] = found.shape, found.stride(), found.dtype
        return found
    shape, stride, dtype = made
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


@functools.cache
def _pure(func: Any) -> bool:
    """Whether an operation's one result shares nothing with what it is given."""
    schema = func._schema
    return len(schema.returns) == 1 and not any(a.alias_info for a in [*schema.arguments, *schema.returns])


@functools.cache
def _changes(func: Any) -> bool:
    """Whether an operation writes into its first argument, gives that, and makes nothing else."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    kept = name.endswith("_") and not name.startswith(("resize", "set_", "_resize"))
    return kept and len(schema.returns) == 1 and schema.arguments[0].name == "self"


def _key(func: Any, args: tuple, kwargs: dict) -> Any:
    try:
        key = func, _frozen(args), _frozen(tuple(kwargs.items()))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return type(value), value
