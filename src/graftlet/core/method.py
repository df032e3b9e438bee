# SPDX-License-Identifier: Apache-2.0
"""What a method of adaptation is: a function on a layer's weight, and at most a cheaper equal way to run it.

A subclass says which tensors it has (`params`), how they start (`init`), and what they do to a weight: `delta` for a
`Delta`, `map` for an `InputMap` or `OutputMap`, `transform` for a `Rewrite`, `update` for a `Routed`. Forward, merging,
several adapters, mixed batches, disk and the rest follow.

Methods keep no state: everything of one adapter on one layer is in the view `p`, read as `p.lora_A`, `p.scaling`,
`p.site`; a name that the layer does not hold is read off the adapter's config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MergeError, UnsupportedLayerError
from .algebra import Algebra, solved
from .group import Group
from .kernel import autocasts, fast, fast_map, fast_product
from .settled import Lean, Settled, lean

if TYPE_CHECKING:
    from ..config import PeftConfig
    from ..weights.product import Product
from ..weights.site import Site

Weights = tuple[Tensor, "Tensor | None"]
"""A weight `[out, in, *kernel]` and its bias `[out]`, or None."""


@dataclass(frozen=True)
class Spec:
    """One tensor of an adapter, before it exists.

    shape: for one matrix; a stack of experts gets a stack of them (see `Method.stacked`).
    trainable: a parameter that learns; otherwise a buffer.
    dtype: None follows the layer's.
    saved: stands in the file. persistent: stands in `state_dict()` too (buffers only).
    disk: its name in the file where that is not its name in memory.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    dtype: torch.dtype | None = None
    saved: bool = True
    persistent: bool = True
    disk: str | None = None

    @classmethod
    def frozen(cls, shape: tuple[int, ...], dtype: torch.dtype | None = None, saved: bool = False) -> Spec:
        """A tensor that does not learn, and stands in no file and no `state_dict()` unless `saved`."""
        return cls(shape, trainable=False, dtype=dtype, saved=saved, persistent=saved)


class View:
    """One adapter's tensors and settings on one layer.

    dtype: what the adapter computes in. key: the layer's path in the model. training: the layer is in training mode.
    shared: the names of what all layers of the adapter share. adapter: its name. peers: all adapters of the layer, each
        with its method and its view. casts: inputs are brought to `dtype`.
    """

    config: PeftConfig
    site: Site
    dtype: torch.dtype
    key: str
    training: bool = False
    shared: tuple[str, ...] = ()
    adapter: str = ""
    peers: Mapping[str, tuple[Method, View]] = {}
    casts: bool = True

    def __init__(self, config: PeftConfig, site: Site, dtype: torch.dtype, values: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():  # some compilers cannot follow the shorter way
            for name, value in values.items():
                setattr(self, name, value)
        else:
            self.__dict__.update(values)
        self._values = values
        self.config = config
        self.site = site
        self.dtype = dtype

    def cast(self, x: Tensor) -> Tensor:
        """`x` in the adapter's dtype; look-up indices, and anything under autocast, as they are."""
        if not self.casts or not x.is_floating_point() or autocasts(x):
            return x
        return x.to(self.dtype)

    def over(self, values: Mapping[str, Any]) -> View:
        """The same view with other tensors."""
        return View(self.config, self.site, self.dtype, {**self._values, **values})

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors, and what all its layers share."""
        return {name: value for name, value in self._values.items() if isinstance(value, Tensor)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.config, name)


class Holder(Protocol):
    """A layer as `Method.link` sees it: the tensors of an adapter can be read and replaced."""

    def view(self, name: str) -> View: ...
    def tensor(self, adapter: str, tensor_name: str) -> Tensor: ...
    def put(self, adapter: str, tensor_name: str, tensor: Tensor, spec: Spec) -> None: ...
    def mirror(self, adapter: str, tensor_name: str, source: Any, source_name: str) -> None: ...


class Allocator(Protocol):
    """What decides, as an adapter is trained, which parts of it stay."""

    def update_and_allocate(self, step: int) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


class Stage(Protocol):
    """The layer as far as it is adapted: callable, and able to tell its weight and the one before any adapter.

    pristine: no adapter acts in it, so that both are the same. bias: the weight's bias alone, as cheap as can be had.
    product: what calling the stage is, where that is just a product with the layer's weight; else None.
    """

    @property
    def pristine(self) -> bool: ...
    def __call__(self, x: Tensor) -> Tensor: ...
    def bias(self) -> Tensor | None: ...
    def weight(self) -> Weights: ...
    def origin(self) -> Weights: ...
    def product(self) -> Product | None: ...


class Method(Algebra):
    """Base of all methods that act on a layer.

    law: several active adapters add up (`sum`: each delta taken at the original weight), each sees what the one before
        made (`chain`), or exclude each other (`one`).
    reads_weight: `transform` depends on the weight it is given, so the storage must be readable.
    unmergeable: why merging is refused; None where it is not. unmixable: why a batch of several adapters' rows is.
    follows_ties: layers that share a target's weight are adapted along with it.
    carries: arguments of a model's call that are for the method: taken out of it, and found in `context.current()`.
    controls: functions of the method that the model has while such an adapter is on it; a layer's view comes first.
    """

    law: ClassVar[Literal["sum", "chain", "one"]] = "sum"
    reads_weight: ClassVar[bool] = True
    unmergeable: ClassVar[str | None] = None
    unmixable: ClassVar[str | None] = None
    follows_ties: ClassVar[bool] = False
    saves_embedding: ClassVar[bool] = True
    """An embedding that it is on goes to the file with it, as the format has it."""
    carries: ClassVar[tuple[str, ...]] = ()
    controls: ClassVar[tuple[str, ...]] = ()
    exact_start: ClassVar[bool] = True
    """A new adapter changes nothing until it is trained."""

    # what an adapter has

    def complete(self, config: PeftConfig, model: nn.Module) -> None:
        """Fill what the config leaves to the model it is put into."""

    def pick(self, site: Site, config: PeftConfig, key: str) -> Method:
        """The method for this layer: itself, or a variant that the config asks for."""
        return self

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        """What is resolved a layer (rank, scaling, dropout): `layer.<name>[adapter]`. Raise where it cannot be."""
        return {}

    def deal(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
        """Settings that depend on all layers together, by layer: its share of a budget, its number in their order."""
        return {}

    def params(self, site: Site, p: View) -> dict[str, Spec]:
        """The tensors by name: `hra_u`, or `lora_A.weight` for one that has a module of its own in memory."""
        raise NotImplementedError

    def init(self, p: View) -> Tensor | None:
        """Fill the tensors in place. A new base weight `[out, in, *kernel]` may be returned; it is then written."""
        raise NotImplementedError

    def derived(self, config: PeftConfig) -> bool:
        """Whether loading must run `init` too, since part of what it makes is not in the file."""
        return False

    def group(self, key: str) -> str:
        """Of the layers that share `commons` in groups, the one that a layer is of."""
        return ""

    def commons(self, config: PeftConfig, sites: Mapping[str, Site]) -> dict[str, Spec]:
        """Tensors that all of an adapter's layers share, held once: `p.<name>` on each of them."""
        return {}

    def init_commons(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        """Fill the shared tensors in place."""

    def link(self, layers: Mapping[str, Holder], adapter: str) -> None:
        """Called once all layers of an adapter exist: share tensors between them, deal out what is dealt out in all."""

    def join(self, p: View, others: list[View]) -> None:
        """Raise where an adapter cannot act together with these others on its layer."""
        if others and self.law == "one":
            raise ConfigError(f"{type(self).__name__} on {p.key!r} cannot act beside other adapters; activate one.")

    def meet(self, config: PeftConfig, other: PeftConfig) -> None:
        """Raise where an adapter cannot stand on the same model as another one, whichever came first."""

    def stacked(self, name: str, spec: Spec, experts: int) -> tuple[int, ...]:
        """The shape of a tensor that serves a stack of experts."""
        return (experts, *spec.shape)

    def unstacked(self, name: str, tensor: Tensor, experts: int) -> Tensor:
        """That tensor as `[experts, *shape]`."""
        return tensor

    # a call's tokens

    def reach(self, config: PeftConfig, ids: Tensor | None, given: Mapping[str, Tensor]) -> Tensor | None:
        """How many tokens at the end of each row an adapter acts on; None where a call does not say.

        Asked once a call, with its `ids` `[rows, tokens]` and what it carries (`carries`). Layers find it token by token
        under `reaches(adapter)` in the call's context. An adapter whose method does not override this acts on all.
        """
        raise NotImplementedError

    def rehearse(
        self, p: View, run: Callable[[Mapping[str, Tensor] | None], Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """What an adapter finds out about a call before it, to be carried in it.

        `run` gives the last hidden state `[rows, tokens, features]` of the same call with these values carried, or of the
        base alone for None. size: the call's rows and tokens. `p` is the view of one of the adapter's layers. A method
        that overrides this sees all tokens in every call: the model then runs without a key-value cache.
        """
        raise NotImplementedError

    # its training

    def penalty(self, views: Sequence[View]) -> Tensor | None:
        """What an adapter adds to the model's loss in training, from its views on all its layers."""
        return None

    def allocator(self, layers: Mapping[str, Holder], adapter: str) -> Allocator | None:
        """What shrinks an adapter while it is trained, asked after each optimizer step; None where nothing does."""
        return None

    # its file

    def pack(self, p: View, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What goes to the file of a layer's tensors, by key, where that is not the tensors as they are held."""
        return tensors

    def unpack(self, p: View, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors of a layer, by key, as the layer holds them; a tensor that says nothing is left out."""
        return given

    def check_loaded(self, p: View) -> None:
        """Raise `AdapterFileError` where the tensors of a layer, just loaded, hold what they must not (`check_places`)."""

    # what an adapter does

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        """The adapted weight and bias."""
        raise NotImplementedError

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        """The adapted layer's output. The general way: run the operation with the transformed weight."""
        W, b = self.adapted(p, before)
        y = fast_product(p.site, x, W, b)
        return p.site.op(x.to(W.dtype) if x.is_floating_point() else x, W, b) if y is None else y

    def adapted(self, p: View, before: Stage) -> Weights:
        """The weight after this adapter, given the stage before it, by the method's law."""
        W, b = before.weight()
        if self.law == "chain" or not self.reads_weight:
            return self.apply(p, W, b)
        W0, b0 = before.origin()
        W1, b1 = self.apply(p, W0, b0)
        if W is W0:
            return W1, b1
        return W + (W1 - W0), b if b1 is None or b0 is None or b is None else b + (b1 - b0)

    def apply(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        """`transform`, over each expert of a stack."""
        if not p.site.stack:
            return self.transform(p, W, b)
        own = {name: tensor for name, tensor in p.tensors().items() if name not in p.shared}
        tensors = [self.unstacked(name, tensor, p.site.stack) for name, tensor in own.items()]

        def one(W: Tensor, *parts: Tensor) -> Tensor:
            return self.transform(p.over(dict(zip(own, parts, strict=True))), W, None)[0]

        return torch.vmap(one)(W, *tensors), b


class Adding(Method):
    """The output is the one before and something beside it. A subclass gives `update`.

    dropout: the setting, a module, that is dropout on the adapter's input; empty where there is none.
    """

    reads_weight = False
    dropout: ClassVar[str] = ""

    def update(self, p: View, x: Tensor) -> Tensor:
        """What the adapter adds to the output, for an input that has been through `drop`."""
        raise NotImplementedError

    def drop(self, p: View, x: Tensor) -> Tensor:
        """Dropout on the adapter's input, where the method has one; indices to look up pass as they are."""
        held = vars(p).get(self.dropout)
        return x if held is None or type(held) is nn.Identity or not x.is_floating_point() else held(x)

    def rate(self, p: View) -> float | None:
        """The share of the input that `drop` takes; None where that is not torch's own dropout."""
        held = vars(p).get(self.dropout)
        if type(self).drop is not Adding.drop or not (held is None or isinstance(held, (nn.Identity, nn.Dropout))):
            return None
        return held.p if isinstance(held, nn.Dropout) and held.training else 0.0

    def added(self, p: View, x: Tensor) -> Tensor:
        """What the adapter adds to the output."""
        return self.update(p, self.drop(p, x))

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        y = fast(self, p, x, before)
        return before(x) + self.added(p, p.cast(x)) if y is None else y


class Delta(Adding):
    """W' = W + dW(p), where dW does not depend on W. The least a subclass gives is `delta`."""

    def delta(self, p: View) -> Tensor:
        """dW, of the weight's shape."""
        raise NotImplementedError

    def delta_bias(self, p: View) -> Tensor | None:
        """db `[out]`, or None."""
        return None

    def onto(self, p: View, W: Tensor) -> Tensor:
        """`W + dW`, for a weight of dW's shape and dtype."""
        return W + self.delta(p)

    def rounded(self, p: View, dtype: torch.dtype) -> Tensor:
        """dW in another dtype."""
        return self.delta(p).to(dtype)

    def whole(self, p: View, x: Tensor) -> bool:
        """Whether `update` is the layer's operation with the whole of dW, for this input."""
        return type(self).update is Delta.update

    def grouped(self, views: Sequence[View], before: Stage) -> Group | None:
        first = views[0]
        if first.training or not first.site.linear:
            return None
        parts = [f for p in views if (f := self.factored(p)) is not None]
        biases = [self.delta_bias(p) for p in views]
        if len(parts) < len(views) or len({f.A.dtype for f in parts}) > 1 or any(b is not None for b in biases):
            return None
        return Group.of(parts, first.dtype if first.casts else None)

    def settled(self, p: View, before: Stage) -> Settled | None:
        thin = self.thin(p)
        if thin is None or thin.rate or (product := before.product()) is None:
            return None
        return Settled(thin.A.t(), thin.B.t(), thin.scale, product=product)

    def lean(self, p: View, before: Stage) -> Lean | None:
        return lean(self.thin(p), before.product(), p.casts) if type(self).forward is Adding.forward else None

    def update(self, p: View, x: Tensor) -> Tensor:
        return p.site.op(x, self.delta(p), self.delta_bias(p))

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        dW, db = self.delta(p), self.delta_bias(p)
        W = p.site.fit(W, dW) + dW
        return W, b if db is None else (db if b is None else b + db)

    def change(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        return self._change(p, W), self.delta_bias(p)

    def change_bias(self, p: View, weights: Callable[[], Weights]) -> Tensor | None:
        return self.delta_bias(p)

    def inverse(self, p: View, W: Tensor, b: Tensor | None) -> Tensor:
        change = self._change(p, W)
        return p.site.fit(W, change) - change

    def _change(self, p: View, W: Tensor) -> Tensor:
        return self.apply(p, torch.zeros_like(W), None)[0] if p.site.stack else self.delta(p)


class InputMap(Method):
    """W' = W M^T: what goes into the weight is mapped first, so the weight is never read. A subclass gives `map`."""

    law = "chain"
    reads_weight = False
    halves: ClassVar[bool] = False
    """The map keeps its precision when its products are in half: what it adds to `v` is found by itself."""

    def map(self, p: View, v: Tensor, transpose: bool = False) -> Tensor:
        """v M (or v M^T) for rows `v` of `site.basis` entries."""
        raise NotImplementedError

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        return p.site.on_rows(lambda rows: self.map(p, rows, transpose=not p.site.maps_output), W), b

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        if p.site.stack:
            return super().back(p, like)
        matrix = self.map(p, torch.eye(p.site.basis, dtype=like.dtype, device=like.device), not p.site.maps_output)
        return lambda W: p.site.on_rows(lambda rows: solved(matrix, rows), W)

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        y = p.site.mapped(lambda v: self._mapped(p, v), x, before)
        return super().forward(p, x, before) if y is None else y

    def _mapped(self, p: View, v: Tensor) -> Tensor:
        made = fast_map(self, p, v)
        return self.map(p, p.cast(v)).to(v.dtype) if made is None else made


class OutputMap(Method):
    """W' = M W, b' = M b: what comes out of the layer is mapped. A subclass gives `map`."""

    law = "chain"
    reads_weight = False

    def map(self, p: View, y: Tensor) -> Tensor:
        """M y for rows `y` of `features_out` entries."""
        raise NotImplementedError

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        site = p.site
        return site.on_out(lambda v: self.map(p, v), W), None if b is None else self.map(p, b)

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        if p.site.stack:
            return super().back(p, like)
        matrix = self.map(p, torch.eye(p.site.features_out, dtype=like.dtype, device=like.device))
        return lambda W: p.site.on_out(lambda rows: solved(matrix, rows), W)

    def forward(self, p: View, x: Tensor, before: Stage) -> Tensor:
        return p.site.on_channels(lambda y: self.map(p, p.cast(y)), before(x))


class Rewrite(Method):
    """W' = f(p, W): anything that must see the weight. A subclass gives `transform`."""


class Routed(Adding):
    """An update that depends on the input, so that no weight W' stands for it. A subclass gives `update`."""

    unmergeable = "what it adds depends on the input"

    def transform(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        raise MergeError(f"{type(self).__name__} has no merged form: {self.unmergeable}.")

    def settings(self, site: Site, config: PeftConfig, key: str) -> dict[str, Any]:
        if site.opaque:
            raise UnsupportedLayerError(
                f"{type(self).__name__} cannot adapt {key!r}: {self.unmergeable}, and this layer can only be adapted "
                "through its weight."
            )
        return {}


class Replace:
    """A module that is trained whole, as a copy beside the frozen one. A subclass names where the copies stand.

    copies: the attribute that holds them, and what their keys begin with in the file. original: the frozen one's.
    """

    copies: ClassVar[str]
    original: ClassVar[str]
    law: ClassVar[str] = "one"
    unmergeable: ClassVar[str | None] = None
    exact_start: ClassVar[bool] = True
    on_disk: ClassVar[bool] = True
    """Whether the copies' name stands in the file's keys; the base model's own keys are used otherwise."""
