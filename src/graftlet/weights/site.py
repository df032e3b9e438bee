# SPDX-License-Identifier: Apache-2.0
"""What a layer does with a weight.

A site shows the layer's weight as `[out, in, *kernel]` whatever its layout, and runs the layer's operation with another
weight in its place. Transposition, kernels, groups and look-ups live here and nowhere else: a method sees matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MergeError, UnsupportedLayerError
from .product import Product, Weighted, watched
from .storage import PLAIN, Storage, packed, qualified, storage_of, unusable
from .whole import in_use, own_part, put, put_part, whole_of

Map = Callable[[Tensor], Tensor]
"""A linear map on the last dimension."""


class Site:
    """One weight of one module.

    Attributes:
        module: the layer. name, bias: the attribute names of its weight and bias.
        opaque: the module's output is no linear function of the weight alone (attention, expert stacks), so an adapter
            must act on the weight and cannot add to the output.
        stack: how many matrices the weight holds, one an expert; 0 for an ordinary weight.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    opaque: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    """The operation is a product with the weight, on the input's last dimension."""
    stack: int = 0
    groups: int = 1
    maps_output: ClassVar[bool] = False
    """An input map turns what is looked up, not what looks it up."""
    masks: ClassVar[dict[str, Any]] = {}
    """Attributes that the wrapped module answers differently, so that nothing goes round the adapter."""

    def __init__(self, module: nn.Module, name: str = "weight", bias: str | None = "bias") -> None:
        self.module, self.name, self.bias = module, name, bias

    # the weight

    @property
    def storage(self) -> Storage:
        """How the weight is kept now: a layer may be quantised after it was adapted."""
        return storage_of(self.module, self.name)

    @property
    def shape(self) -> torch.Size:
        """`(out, in, *kernel)`, or `(experts, out, in)` for a stack."""
        return self.storage.shape(self.module, self.name)

    @property
    def features_out(self) -> int:
        return self.shape[1 if self.stack else 0]

    @property
    def features_in(self) -> int:
        return self.shape[2 if self.stack else 1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's sizes; empty for what is no convolution."""
        return ()

    @property
    def columns(self) -> int:
        """The inputs of one output: the width of the weight as a matrix `[out, columns]`."""
        return self.shape[2 if self.stack else 1 :].numel()

    @property
    def has_bias(self) -> bool:
        return self.bias is not None and getattr(self.module, self.bias, None) is not None

    @property
    def weight(self) -> Tensor:
        """The tensor as kept, which may be packed."""
        return self.storage.tensor(self.module, self.name)

    @property
    def device(self) -> torch.device:
        """Where the layer is, and its adapters."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in, and what its weight is read in."""
        return self.storage.dtype(self.module, self.name)

    def canonical(self, kept: Tensor) -> Tensor:
        """The kept layout as `[out, in, *kernel]`."""
        return kept

    def kept(self, canonical: Tensor) -> Tensor:
        """`[out, in, *kernel]` in the kept layout."""
        return canonical

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[out, in, *kernel]` and bias `[out]` or None, in floating point.

        Raises `UnsupportedLayerError` where the way it is kept lets nobody read it.
        """
        self.check_readable()
        return self.canonical(self.storage.read(self.module, self.name)), self.read_bias()

    def check_readable(self, who: str = "this") -> None:
        """Raise `UnsupportedLayerError` unless the weight can be read, which `who` needs."""
        if why := self.storage.unreadable(self.module, self.name):
            raise UnsupportedLayerError(
                f"{who} reads the layer's weight, and that of a {type(self.module).__name__} cannot be read: {why}. "
                "A method that never reads it, such as LoRA or HRA, works on this layer."
            )

    def check_writable(self) -> None:
        """Raise `MergeError` unless another weight can be kept."""
        if why := self.storage.unwritable(self.module, self.name):
            raise MergeError(f"the weight of a {type(self.module).__name__} cannot be written: {why}.")

    def read_bias(self) -> Tensor | None:
        """The bias `[out]`, where there is one."""
        return in_use(self._held_bias()) if self.has_bias else None

    def _held_bias(self) -> Tensor:
        return self.storage.beside(self.module, cast(str, self.bias), getattr(self.module, cast(str, self.bias)))

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep another weight and bias. Raises `MergeError` where the layer has no room for them."""
        self.check_writable()
        if bias is not None and not self.has_bias:
            raise MergeError(
                f"the adapter changes the bias of a {type(self.module).__name__} that has none; "
                "use the adapter unmerged, or give the base layer a bias of zeros."
            )
        self.storage.write(self.module, self.name, self.kept(weight))
        if bias is not None:
            put(self._held_bias(), bias)

    def save(self) -> tuple[Any, Any]:
        """What `restore` needs to bring the weight's and bias's very bits back."""
        bias = own_part(self._held_bias()) if self.has_bias else None
        return self.storage.save(self.module, self.name), bias

    def restore(self, saved: tuple[Any, Any]) -> None:
        self.storage.restore(self.module, self.name, saved[0])
        if saved[1] is not None:
            put_part(self._held_bias(), saved[1])

    def original(self, saved: tuple[Any, Any]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they were when `saved` was made."""
        bias = None if saved[1] is None else whole_of(self._held_bias(), saved[1])
        return self.canonical(self.storage.recall(self.module, self.name, saved[0])), bias

    # the operation

    def product(self) -> Product | None:
        """What calling the module is, where that is a product with its weight and nothing else; None where it is more."""
        return None

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The layer's operation on `x` with another weight (any number of outputs)."""
        raise NotImplementedError

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        """A matrix `[out, r]` on the channels of what `op` gave."""
        return F.linear(h, matrix)

    def compose(self, left: Tensor, right: Tensor) -> Tensor:
        """The weight of `mix(op(x, right), left)`."""
        return left @ right

    def on_channels(self, function: Map, y: Tensor) -> Tensor:
        """A map of the last dimension, applied on the channels of the layer's output."""
        return function(y)

    def on_bias(self, function: Map, bias: Tensor | None) -> Tensor | None:
        """A map of the last dimension, applied on the bias."""
        return None if bias is None else function(bias)

    def on_out(self, function: Map, weight: Tensor) -> Tensor:
        """A map of the last dimension, applied on the output side of a weight: `M W`."""
        return function(weight.transpose(0, -1)).transpose(0, -1)

    # the input side, for methods that map what goes into the weight

    @property
    def basis(self) -> int:
        """The size of the space that an input map acts on."""
        return self.features_in

    def on_rows(self, function: Map, weight: Tensor) -> Tensor:
        """A map of the last dimension, applied on the input side of a weight: `W M`."""
        return function(weight)

    def mapped(self, function: Map, x: Tensor, before: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The layer's output with its input mapped, or None where only the weight can be mapped."""
        return before(function(x))

    def cells(self, weight: Tensor) -> Tensor:
        """A weight as matrices, `[cells, out, columns]`: one, or one a group of a convolution or expert of a stack."""
        return weight if self.stack else weight.flatten(1)[None]

    def spread(self, rows: Tensor) -> Tensor:
        """Rows `[cells, n, columns]` of such matrices over the inputs of all groups: zeros where a group does not look."""
        return rows

    def fit(self, weight: Tensor, like: Tensor) -> Tensor:
        """A weight in the form that a delta of the shape of `like` can be added to."""
        return weight

    def rows(self, x: Any) -> int | None:
        """How many batch rows an input has; None where rows cannot be told apart."""
        return x.shape[0] if isinstance(x, Tensor) and x.dim() > 1 else None

    def select(self, x: Tensor, index: Tensor) -> Tensor:
        """These batch rows of an input."""
        return x.index_select(0, index)

    def gather(self, parts: list[tuple[Tensor, Any]]) -> Any:
        """One output from `(row indices, output)` of groups of rows."""
        order = torch.cat([index for index, _ in parts]).argsort()
        return torch.cat([y for _, y in parts]).index_select(0, order)

    def accepts(self, weight: Tensor) -> None:
        """Raise `MergeError` unless the layer can keep this weight."""


class Linear(Site):
    """`nn.Linear` and its kin: y = x W^T + b."""

    kinds = ("torch.nn.modules.linear.Linear",)
    linear = True

    def product(self) -> Product | None:
        W, b, storage = self.weight, self.read_bias(), self.storage
        if W.requires_grad or (b is not None and b.requires_grad) or watched(self.module):
            return None
        if (dtype := storage.computes_in(self.module, self.name)) is not None:
            return Product(lambda: storage.read(self.module, self.name).to(dtype), b, dtype, casts=True)
        if storage is PLAIN and self._known and type(W) in (Tensor, nn.Parameter):
            return Product(self.canonical(W), b, W.dtype)
        return None

    @functools.cached_property
    def _known(self) -> bool:
        kind = type(self.module)
        return f"{kind.__module__}.{kind.__qualname__}" in self.kinds

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, weight, bias)


class Turned(Site):
    """A weight that is kept as `[in, out]`."""

    @property
    def shape(self) -> torch.Size:
        return self.storage.shape(self.module, self.name)[::-1]

    def canonical(self, kept: Tensor) -> Tensor:
        return kept.T

    def kept(self, canonical: Tensor) -> Tensor:
        return canonical.T


class Conv1D(Turned, Linear):
    """transformers' `Conv1D`: a Linear that keeps its weight as `[in, out]`."""

    kinds = ("transformers.pytorch_utils.Conv1D",)


class Conv(Site):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: weight `[out, in / groups, *kernel]`, channels in dimension 1."""

    kinds = tuple(f"torch.nn.modules.conv.Conv{n}d" for n in (1, 2, 3))

    def __init__(self, module: nn.Module, name: str = "weight", bias: str | None = "bias") -> None:
        super().__init__(module, name, bias)
        self.groups = cast(int, module.groups)
        self.dims = len(self.kernel)
        self.function = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.storage.shape(self.module, self.name)[2:])

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        module = cast(nn.Conv2d, self.module)
        padding: Any = module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        groups = self.groups if weight.shape[1] * self.groups == self.features_in else 1
        return self.function(x, weight, bias, module.stride, padding, module.dilation, groups)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self.function(h, matrix.reshape(*matrix.shape[:2], *[1] * self.dims), groups=self.groups)

    def compose(self, left: Tensor, right: Tensor) -> Tensor:
        """With groups, each group's outputs read its own share of `right`'s: the result is dense over the inputs."""
        left = left.reshape(self.groups, -1, left.shape[1])
        right_rows = right.reshape(self.groups, -1, right[0].numel())
        return (left @ right_rows).reshape(-1, *right.shape[1:])

    def on_channels(self, function: Map, y: Tensor) -> Tensor:
        channels = -1 - self.dims  # counted from the end: a batch dimension may be missing
        return function(y.movedim(channels, -1)).movedim(-1, channels)

    @property
    def basis(self) -> int:
        return self.features_in // self.groups * torch.Size(self.kernel).numel()

    def on_rows(self, function: Map, weight: Tensor) -> Tensor:
        return function(weight.flatten(1)).reshape(weight.shape)

    def mapped(self, function: Map, x: Tensor, before: Callable[[Tensor], Tensor]) -> Tensor | None:
        return None

    def fit(self, weight: Tensor, like: Tensor) -> Tensor:
        """The block-diagonal weight of a grouped convolution, written out where the delta is dense."""
        if weight.shape == like.shape:
            return weight
        dense = weight.new_zeros(like.shape)
        for g, (rows, columns) in enumerate(self._blocks(like)):
            dense[rows, columns] = weight.chunk(self.groups)[g]
        return dense

    def cells(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).unflatten(0, (self.groups, -1))

    def spread(self, rows: Tensor) -> Tensor:
        if rows.shape[2] == self.features_in * torch.Size(self.kernel).numel():
            return rows
        own = rows.unflatten(2, (-1, *self.kernel))
        wide = own.new_zeros((*own.shape[:2], self.features_in, *self.kernel))
        for g, part in enumerate(own):
            wide[g, :, g * part.shape[1] : (g + 1) * part.shape[1]] = part
        return wide.flatten(2)

    def kept(self, canonical: Tensor) -> Tensor:
        if canonical.shape == self.storage.shape(self.module, self.name):
            return canonical
        return torch.cat([canonical[rows, columns] for rows, columns in self._blocks(canonical)])

    def accepts(self, weight: Tensor) -> None:
        if weight.shape == self.storage.shape(self.module, self.name):
            return
        rest = weight.clone()
        for rows, columns in self._blocks(weight):
            rest[rows, columns] = 0
        if rest.any():
            raise MergeError(
                f"the adapter mixes channels across the {self.groups} groups of a {type(self.module).__name__}, which "
                "the layer's weight cannot hold; use the adapter unmerged."
            )

    def _blocks(self, dense: Tensor) -> list[tuple[slice, slice]]:
        out, inner = dense.shape[0] // self.groups, dense.shape[1] // self.groups
        return [(slice(g * out, (g + 1) * out), slice(g * inner, (g + 1) * inner)) for g in range(self.groups)]


class Embedding(Turned):
    """`nn.Embedding` as a map of one-hot rows: in: vocabulary, out: dimension. An input map turns what is looked up."""

    kinds = ("torch.nn.modules.sparse.Embedding",)
    maps_output = True

    @property
    def scale(self) -> Any:
        """What some models multiply a looked-up row by."""
        return getattr(self.module, "embed_scale", None)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        module = cast(nn.Embedding, self.module)
        y = F.embedding(x, weight.T, module.padding_idx, None, 2.0, module.scale_grad_by_freq, False)
        return y if self.scale is None else y * self.scale

    @property
    def basis(self) -> int:
        return self.features_out

    def on_rows(self, function: Map, weight: Tensor) -> Tensor:
        return function(weight.T).T

    def mapped(self, function: Map, x: Tensor, before: Callable[[Tensor], Tensor]) -> Tensor | None:
        return function(before(x))

    def rows(self, x: Any) -> int | None:
        return x.shape[0] if isinstance(x, Tensor) and x.dim() > 0 else None


class Attention(Site):
    """The packed input projection of `nn.MultiheadAttention`: `[3 E, E]`."""

    kinds = ("torch.nn.modules.activation.MultiheadAttention",)
    opaque = True
    # encoder layers would otherwise read the bare weights on their fast path
    masks: ClassVar[dict[str, Any]] = {"_qkv_same_embed_dim": False}

    def __init__(self, module: nn.Module, name: str = "in_proj_weight", bias: str | None = "in_proj_bias") -> None:
        if getattr(module, name) is None:
            raise UnsupportedLayerError(
                "a MultiheadAttention with its own key or value size keeps three separate projections and cannot be "
                "adapted as one; target its out_proj alone."
            )
        super().__init__(module, name, bias)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        swapped: dict[str, Tensor] = {self.name: weight}
        if bias is not None:
            swapped[cast(str, self.bias)] = bias
        out = self.module.out_proj
        if isinstance(out, Weighted):
            swapped["out_proj.base_layer.weight"], out_bias = out.effective()
            if out_bias is not None:
                swapped["out_proj.base_layer.bias"] = out_bias
        return functional_call(self.module, swapped, (x, *args), kwargs)

    @property
    def batch(self) -> int:
        return 0 if cast(nn.MultiheadAttention, self.module).batch_first else 1

    def rows(self, x: Any) -> int | None:
        return x.shape[self.batch] if x.dim() == 3 else None

    def select(self, x: Tensor, index: Tensor) -> Tensor:
        return x  # keys, values and masks come along in many shapes: each group sees the whole batch

    def gather(self, parts: list[tuple[Tensor, Any]]) -> Any:
        order = torch.cat([index for index, _ in parts]).argsort()
        outputs = torch.cat([y[0].index_select(self.batch, i) for i, y in parts], self.batch)
        maps = None if parts[0][1][1] is None else torch.cat([y[1].index_select(0, i) for i, y in parts])
        return outputs.index_select(self.batch, order), maps if maps is None else maps.index_select(0, order)


class Parameter(Site):
    """A bare `nn.Parameter` of any module: `[out, in]`, or a stack of experts `[experts, out, in]`.

    A module that says `is_transposed = True` keeps its stack as `[experts, in, out]`. Several parameters of one module
    are adapted by wrappers inside each other; `module` owns the parameter, `entry` is what the outermost wrapper calls.
    """

    opaque = True

    def __init__(self, entry: nn.Module, name: str) -> None:
        owner, path = entry, name
        while isinstance(owner, Weighted):
            owner, path = cast(nn.Module, owner.base_layer), f"base_layer.{path}"
        super().__init__(owner, name, None)
        self.entry, self.path = entry, path
        if len(kept := self.storage.shape(owner, name)) not in (2, 3):
            raise UnsupportedLayerError(
                f"parameter {name!r} has {len(kept)} dimensions; a matrix or a stack of them can be adapted."
            )
        self.stack = kept[0] if len(kept) == 3 else 0
        self.transposed = bool(self.stack) and getattr(owner, "is_transposed", False) is True

    @property
    def shape(self) -> torch.Size:
        *stack, rows, columns = self.storage.shape(self.module, self.name)
        return torch.Size((*stack, *((columns, rows) if self.transposed else (rows, columns))))

    def canonical(self, kept: Tensor) -> Tensor:
        return kept.transpose(-1, -2) if self.transposed else kept

    def kept(self, canonical: Tensor) -> Tensor:
        return canonical.transpose(-1, -2) if self.transposed else canonical

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.entry, {self.path: self.kept(weight)}, (x, *args), kwargs)

    def rows(self, x: Any) -> int | None:
        return None


KINDS: tuple[type[Site], ...] = (Linear, Conv1D, Conv, Embedding, Attention)


def site_of(module: nn.Module) -> Site | None:
    """The site of a module, found by the names of its class and bases, most special first; None where there is none.

    A class of a quantised back end that derives from none of them is a linear layer.
    """
    kind = _kind_of(type(module))
    if kind is None and packed(module) and unusable(module) is None:
        kind = Linear
    return None if kind is None else kind(module)


@functools.lru_cache(maxsize=4096)
def _kind_of(module: type) -> type[Site] | None:
    names = map(qualified, module.__mro__)
    return next((kind for name in names for kind in KINDS if name in kind.kinds), None)
