# SPDX-License-Identifier: Apache-2.0
"""A frozen product and a low-rank update in one step of autograd:   y = x W^T + b + s (x A^T) B^T

What it saves, beside the plain way: the input is kept once for all layers that are given it, in its own dtype; no product
is as wide as the output but the result, into which the others are added as they are made; and the gradients of a shared
input are summed inside the products (`Meeting`), not by passes of their own. Products are in the input's dtype, summed in
single precision by the hardware; A, B and their gradients stay in the adapter's dtype.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.algebra import Thin
from ..core.context import copies
from ..core.copies import Beside, Copies
from ..core.kernel import DTYPES, autocasts, kind_of, transformed
from ..core.method import Adding, Method, Stage, View
from ..weights.product import Product
from . import recipe as recipes
from .recipe import Folded, Pulled, Recipe, recipe_of


def forward(method: Adding, p: View, x: Tensor, before: Stage) -> Tensor | None:
    """The kernel: for an update of two thin products on a frozen linear layer that nothing else looks at."""
    if type(method).thin is Method.thin or not isinstance(x, Tensor) or (method.derives and x.numel() < worth(x)):
        return None
    if (product := before.product()) is None or not _ours(x, product):
        return None
    return None if (thin := method.thin(p)) is None else _fitting(x, thin, product, p.casts)


def worth(x: Tensor) -> int:
    """From how many numbers on the step, which the host takes longer for, is worth it where factors have to be made too."""
    return 1 << 25 if kind_of(x) == "cuda" else 1 << 20


def product_of(x: Tensor, thin: Thin, product: Product, casts: bool) -> Tensor | None:
    """The kernel, where the update and the product are known. casts: factors may be brought to the input's dtype."""
    return _fitting(x, thin, product, casts) if _ours(x, product) else None


def _fitting(x: Tensor, thin: Thin, product: Product, casts: bool) -> Tensor | None:
    if not (casts or thin.A.dtype == x.dtype):
        return None
    if x.dtype == product.dtype:
        return _run(x, thin, product)
    return _run(_lasts.cast(x, product.dtype), thin, product).to(x.dtype)


def _ours(x: Tensor, product: Product) -> bool:
    """Whether an input is a plain one, and nobody else sees to how operations are done: autocast, a transform of functions."""
    if type(x) not in (Tensor, nn.Parameter) or x.dtype not in DTYPES or kind_of(x) == "meta" or x.dim() < 2:
        return False
    if transformed():
        return False
    if product.casts:
        return product.dtype in DTYPES
    return x.dtype == product.dtype and not autocasts(x)


def _run(x: Tensor, thin: Thin, product: Product) -> Tensor:
    (A, B, scale, rate), (W, b, *_) = thin, product
    own = None
    if rate and dropping(x, A) is not None:
        scale /= 1 - rate
    elif rate:
        own, rate = F.dropout(x, rate), 0.0
    if not torch.is_grad_enabled():
        h, _ = _shrunk(x if own is None else own, A.to(x.dtype), rate)
        return _product(x, h, B.to(x.dtype), W, b, scale)
    recipe = recipe_of(x) if own is None else None
    if recipe is not None and recipe.pull is not None and x.requires_grad:
        return _apply_product(x.detach(), None, rate, A, B, W, b, scale, Meeting(x.shape), recipe, *recipe.parts)
    meeting, met = _lasts.meeting(x)
    return _apply_product(met, own, rate, A, B, W, b, scale, meeting, recipe)


Source = Tensor | Callable[[], Tensor]
"""A weight, or what reads it anew each time that it is needed."""


def _at_hand(W: Source) -> Tensor:
    return W if isinstance(W, Tensor) else W()


def dropping(x: Tensor, A: Tensor) -> Any:
    """The kernels for products with dropout, where they serve these tensors; else None."""
    kernels = _dropped(x.is_meta) if kind_of(x) == "cuda" and x.dtype != torch.float32 else None
    if kernels is None or x.shape[-1] % kernels.WORD or x.stride(-1) != 1 or not 0 < len(A) <= kernels.LARGEST:
        return None
    return kernels if x.is_contiguous() else None


@functools.cache
def _dropped(meta: bool) -> Any:
    try:
        if meta:
            from . import dropped_shapes

            return dropped_shapes
        from . import dropped_triton
    except ImportError:  # Triton is not installed
        return None
    return dropped_triton


def _shrunk(x: Tensor, A: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    """The thin product `[rows, r]`, and by which bits the input was dropped at this rate."""
    rows = x.flatten(0, -2)
    if not rate:
        return torch.mm(rows, A.t()), None
    kernels = _dropped(x.is_meta)
    words = kernels.bits(rows, rate, 1)
    return kernels.shrunk(rows, words, [A]), words[0]


def _product(x: Tensor, h: Tensor, B: Tensor, W: Source, b: Tensor | None, scale: float) -> Tensor:
    """The output."""
    y = x.new_empty(*x.shape[:-1], B.shape[0])  # not a view, which could not be changed in place
    flat = y.view(-1, B.shape[0])
    torch.addmm(flat if b is None else b.to(h.dtype), h, B.t(), beta=0 if b is None else 1, alpha=scale, out=flat)
    flat.addmm_(x.flatten(0, -2), _at_hand(W).t())  # the sum is read where it would be written, while products are made
    return y


def scaled(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """s a b, in one step; in single precision out of half where the device can."""
    if dtype not in (None, a.dtype) and a.is_cuda and dtype == torch.float32 and WIDE:
        out = a.new_empty((), dtype=dtype)
        return torch.addmm(out, a, b, out_dtype=dtype, beta=0, alpha=scale)  # type: ignore[call-overload]
    made = torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
    return made if dtype is None else made.to(dtype)


WIDE = "out_dtype" in str(torch.ops.aten.addmm.dtype._schema) if hasattr(torch.ops.aten.addmm, "dtype") else False
"""Products of half precision may be had in single, as they are summed."""


class LowRankProduct(torch.autograd.Function):
    """The step. own: the input of the update, where that is another one than the product's. rate: or how much of the input
    is dropped for it. folded: what the input was made of, where its recipe's way back is taken here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: Tensor | None,
        rate: float,
        A: Tensor,
        B: Tensor,
        W: Source,
        b: Tensor | None,
        scale: float,
        meeting: Meeting,
        recipe: Recipe | None,
        *folded: Tensor,
    ) -> Tensor:
        held = copies()
        thin, wide = (A.to(x.dtype), B.to(x.dtype)) if held is None else held.of(A, B, x.dtype)
        if held is None or own is not None:
            h, words = _shrunk(x if own is None else own, thin, rate)
        else:
            h, words = meeting.shrunk(x, A, thin, rate, held)
        y = _product(x, h, wide, W, b, scale)
        parts = (x if own is None else own,) if recipe is None else folded or tuple(p.detach() for p in recipe.parts)
        fold = Folded(recipe) if recipe is not None and folded else None
        beside = [] if fold is None else fold.taken()
        ctx.save_for_backward(h, thin, wide, W if isinstance(W, Tensor) else None, words, *parts, *beside)
        ctx.fold = fold
        ctx.make, ctx.outer = (None, None) if recipe is None else (recipe.make, recipe.outer)  # not the parts it holds
        ctx.ahead = recipes.told(y, recipes.Thin(h, scale))
        ctx.read = None if isinstance(W, Tensor) else W
        ctx.scale, ctx.meeting, ctx.dtype, ctx.apart = scale, meeting, A.dtype, own is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, A, B, W, words, *parts = ctx.saved_tensors
        wants_x, wants_own, _, wants_A, wants_B = ctx.needs_input_grad[:5]
        dy, fold, pulled = grads[0].flatten(0, -2), ctx.fold, None
        dA = dB = dx = dh = None
        if wants_B:
            found = ctx.ahead and ctx.ahead.take(grads[0])
            dB = scaled(dy.t(), h, ctx.scale, ctx.dtype) if found is None else found.to(ctx.dtype)
        if wants_A or wants_x or wants_own or fold:
            dh = scaled(dy, B, ctx.scale)
        part = (dy, ctx.read if W is None else W, None if ctx.apart or dh is None else (dh, A, words))
        if fold is not None:
            ctx.meeting.add(*part)
            pulled = fold.back(ctx.meeting.gradient().flatten(0, -2), dh if words is None else None, parts)
        if wants_A and dh is not None:
            dA = _gradient_of_A(ctx, dh, words, parts, pulled).to(ctx.dtype)
        if wants_own and dh is not None:
            dx = torch.mm(dh, A).view(parts[0].shape)
        if wants_x:
            ctx.meeting.add(*part)
        return None, dx, None, dA, dB, None, None, None, None, None, *(() if pulled is None else pulled.grads)


def _gradient_of_A(ctx: Any, dh: Tensor, words: Tensor | None, parts: list[Tensor], pulled: Pulled | None) -> Tensor:
    """`dh^T x`: as it was found on the way back of the input, or out of its parts, or by the input, made again."""
    if pulled is not None and pulled.dA is not None:
        return pulled.dA
    if pulled is None and ctx.outer is not None and (dA := ctx.outer(dh, words, *parts)) is not None:
        return dA
    made: Any = ctx.meeting.input(ctx.make, parts) if pulled is None else pulled.made
    x = made.flatten(0, -2)
    return scaled(dh.t(), x, 1.0, ctx.dtype) if words is None else _dropped(x.is_meta).outer(dh, x, words)


class Meeting:
    """An input that several layers are given, and the one place where its gradient is summed.

    Each layer hands in its part as factors; the sum is made when all have, product after product into one tensor. Where
    it is known from the call before which layers will come, their thin products are one.
    """

    def __init__(self, shape: torch.Size, gathers: bool = False) -> None:
        self.shape, self.gathers = shape, gathers
        self.met: list[int] = []
        self.ready: dict[tuple[int, float], tuple[Tensor, Tensor, Tensor | None]] = {}
        self.parts: list[tuple[Tensor, Source]] = []
        self.thin: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.made: Tensor | None = None

    def shrunk(self, x: Tensor, A: Tensor, copy: Tensor, rate: float, held: Copies) -> tuple[Tensor, Tensor | None]:
        """`x A^T` for the input, by A's copy in its dtype, and by which bits the input was dropped."""
        if (key := id(A)) not in self.met:  # what is recomputed comes again
            self.met.append(key)
        if self.met[0] == key:
            held.asked.met[key] = self.met
            if (beside := held.beside(A, copy)) is not None:
                self._prepare(x, beside, rate)
        ready = self.ready.pop((id(copy), rate), None)
        return _shrunk(x, copy, rate) if ready is None else ready[1:]

    def _prepare(self, x: Tensor, beside: Beside, rate: float) -> None:
        words = [None] * len(beside.parts)
        if rate:
            rows, kernels = x.flatten(0, -2), _dropped(x.is_meta)
            words = kernels.bits(rows, rate, len(words))
            thin = kernels.shrunk(rows, words, beside.parts)
        else:
            thin, _ = _shrunk(x, beside.whole, 0.0)
        every = zip(beside.parts, thin.split(beside.rows, 1), words, strict=True)
        self.ready = {(id(A), rate): (A, h, own) for A, h, own in every}  # A lives: its id is its own

    def input(self, make: Callable[..., Tensor] | None, parts: list[Tensor]) -> Tensor:
        """The input as it was kept, or made again of what was: once for all, until its gradient is summed."""
        if make is None:
            return parts[0]
        made = make(*parts) if self.made is None else self.made
        self.made = made if self.gathers else None
        return made

    def add(self, dy: Tensor, W: Source, thin: tuple[Tensor, Tensor, Tensor | None] | None) -> None:
        """A part `dy W + dh A` of the gradient, the second product only where the words say."""
        self.parts.append((dy, W))
        if thin is not None:
            self.thin.append(thin)

    def gradient(self) -> Tensor | None:
        """The sum of the parts; none are left."""
        parts, thin = self.parts, self.thin
        self.parts, self.thin, self.made = [], [], None
        if not parts:
            return None
        dx = _thin_sum(thin)
        if dx is None:
            dx, parts = torch.mm(parts[0][0], _at_hand(parts[0][1])), parts[1:]
        for dy, W in parts:
            dx.addmm_(dy, _at_hand(W))
        return dx.view(self.shape)


def _thin_sum(thin: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor | None:
    whole = [(dh, A) for dh, A, words in thin if words is None]
    dx = None
    if len(whole) == 1:
        dx = torch.mm(*whole[0])
    elif whole:
        dx = torch.mm(torch.cat([dh for dh, _ in whole], 1), torch.cat([A for _, A in whole]))
    dropped = [(dh, A, words) for dh, A, words in thin if words is not None]
    return _dropped(dropped[0][0].is_meta).spread(dropped, dx) if dropped else dx


class _Meet(torch.autograd.Function):
    """The input as it is; backward, what the meeting has summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meeting: Meeting) -> Tensor:
        ctx.meeting = meeting
        ctx.set_materialize_grads(False)
        return x.detach()  # no view, which would hold its base for ever

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, grad = ctx.meeting.gradient(), grads[0]
        return (dx if grad is None else grad if dx is None else dx + grad), None


_apply_product: Any = super(torch.autograd.Function, LowRankProduct).apply  # pyright: ignore[reportAttributeAccessIssue]
_apply_meet: Any = super(torch.autograd.Function, _Meet).apply  # pyright: ignore[reportAttributeAccessIssue]
"""The steps' `apply` without the look at transforms of functions, which `forward` has done."""


class Last:
    """What was made of an input, for as long as the very same tensor is given, and is held by somebody else."""

    made: Any = None
    key: Any = None
    source: weakref.ref[Tensor] | None = None

    def of(self, x: Tensor, key: Any, make: Callable[[], Any]) -> Any:
        """What was made of this input under this key; made now where the last one was another."""
        source, key = self.source, (key, x._version)
        if source is not None and source() is x and self.key == key:
            return self.made
        made = make()
        self.source = None  # what stood there may go as it is replaced, and says so
        self.made, self.key = made, key
        self.source = weakref.ref(x, self.forget)
        return made

    def forget(self, gone: weakref.ref[Tensor]) -> None:
        """Let go of what was made, its input being gone."""
        if self.source is gone:
            self.made = self.source = None


class _Lasts(threading.local):
    """The last input on a thread: as its layers meet at it, and in another dtype.

    Not in the meeting itself: the graph holds that, and would hold itself by it.
    """

    def __init__(self) -> None:
        self.meetings, self.casts = Last(), Last()

    def meeting(self, x: Tensor) -> tuple[Meeting, Tensor]:
        """The meeting of an input, and the input as its layers are given it."""

        def make() -> tuple[Meeting, Tensor]:
            made = Meeting(x.shape, x.requires_grad)
            return made, _apply_meet(x, made) if x.requires_grad else x

        return self.meetings.of(x, None, make)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An input in another dtype: the same tensor for all layers that are given the same."""
        learns = x.requires_grad and torch.is_grad_enabled()
        return self.casts.of(x, (dtype, learns), lambda: x.to(dtype))


_lasts = _Lasts()
