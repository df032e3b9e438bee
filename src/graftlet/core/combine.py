# SPDX-License-Identifier: Apache-2.0
"""A new adapter from others: their weighted sum, by one of several rules.

Everything is worked out before the model is touched. Methods are asked for the change they make (`Method.change`), or for
its factors (`Method.factored`); the result stands in the one method that can hold any low-rank change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import Names, PeftConfig
from ..errors import ConfigError, MergeError, UnsupportedOptionError, listing, nearest
from ..registry import entries, lookup
from ..weights.site import Parameter, Site
from .algebra import Factors
from .arithmetic import RULES, Cut, Fitted, Rule, apart, of_matrices, of_products, stacked
from .block import AdaptedBlock
from .host import AdapterHost, check_known, check_name, hosts
from .layer import AdaptedLayer, widened
from .lifecycle import relink
from .method import Method, Weights
from .replace import Replacement

if TYPE_CHECKING:
    from .tuner import BaseTuner

KINDS = (*RULES, "cat", "svd", *(f"{name}_svd" for name in RULES if name != "linear"), "exact")


@dataclass(frozen=True)
class Fit:
    """What a combination came out as on one layer: its rank, and its distance from the sum it stands for, as a share."""

    rank: int
    error: float


@dataclass(frozen=True)
class Combination:
    """Which adapters, in what shares, and how.

    kind: a name of `KINDS`. density: the share of the entries that pruning keeps. by: how the sign is elected.
    """

    weights: Mapping[str, float]
    kind: str
    cut: Cut = field(default_factory=Cut)
    density: float | None = None
    by: str = "total"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"combination_type={self.kind!r}{nearest(self.kind, KINDS)} Allowed: {', '.join(KINDS)}.")
        if not self.weights:
            raise ConfigError("no adapters to combine were given.")
        if bad := [f"{n}={w!r}" for n, w in self.weights.items() if not abs(w) < float("inf")]:
            raise ConfigError(f"weights {listing(bad)}: finite numbers are needed.")
        low = 0 if self.rule.prune is None or "dare" not in self.kind else 1e-9
        if self.rule.prune is not None and not (self.density is not None and low <= self.density <= 1):
            raise ConfigError(f"{self.kind} needs a density from 0 to 1; {self.density!r} was given.")
        for name, value in (("energy", self.cut.energy), ("svd_clamp", self.cut.clamp)):
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r}; allowed: above 0, up to 1.")
        if self.cut.rank is not None and self.cut.rank < 1:
            raise ConfigError(f"svd_rank={self.cut.rank!r}; 1 or more is needed.")
        if self.by not in ("total", "frequency"):
            raise ConfigError(f"majority_sign_method={self.by!r}; allowed: total, frequency.")

    @property
    def rule(self) -> Rule:
        """The rule on whole changes."""
        return RULES.get(self.kind.removesuffix("_svd"), RULES["linear"])

    @property
    def apart(self) -> bool:
        """Whether tensors are combined each for itself, as the reference does under these names."""
        return self.kind in RULES

    def sum(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Changes as one."""
        return self.rule(changes, weights, self.density, self.by)


@dataclass
class Piece:
    """What a layer's combined adapter is to hold: factors and a bias, or its tensors by name."""

    factors: Factors | None = None
    error: float = 0.0
    bias: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def combine(tuner: BaseTuner, how: Combination, name: str) -> dict[str, Fit]:
    """Put the combination of adapters into a model as an adapter of its own, frozen and not active.

    Returns what came out, by layer. Raises, the model as it was:
        AdapterNameError: an adapter is unknown, or the name taken. MergeError: an adapter changes no weight.
        ConfigError: the adapters do not go together in this way.
    """
    check_known(list(how.weights), list(tuner.peft_config))
    check_name(name, list(tuner.peft_config))
    configs = [tuner.peft_config[n] for n in how.weights]
    found = [h for _, h in hosts(tuner.model) if _held(h, how)]
    _check(found, configs, how)
    with torch.no_grad():
        pieces = {h: _piece(h, how) for h in found if isinstance(h, AdaptedLayer)}
        modules = {h: _module(h, how) for h in found if isinstance(h, Replacement)}
    tuner.inject(_config(configs, how, pieces), name)
    try:
        fits = _fill(tuner, name, pieces, modules)
    except BaseException:
        tuner.delete_adapter(name)
        raise
    relink(tuner.model, name)
    for host in found:
        host.set_requires_grad(name, False)
    return fits


def usual(model: nn.Module, adapters: Sequence[str]) -> str:
    """The kind that suits adapters, where none is named."""
    layers = [h for _, h in hosts(model) if isinstance(h, AdaptedLayer)]
    held = [(layer, n) for layer in layers for n in adapters if n in layer.methods]
    if all(layer.methods[n].additive for layer, n in held):
        return "linear"
    factored = all(layer.methods[n].factored(layer.view(n)) is not None for layer, n in held)
    return "svd" if factored else "exact"


def _check(found: Sequence[AdapterHost], configs: Sequence[PeftConfig], how: Combination) -> None:
    if any(c.trainable_token_indices for c in configs):
        raise UnsupportedOptionError("adapters with trainable_token_indices cannot be combined yet.")
    if not found or any(isinstance(host, AdaptedBlock) for host in found):
        raise MergeError(f"adapters {listing(how.weights)} change no weight, so they cannot be combined.")
    for host in found:
        for adapter, _ in _held(host, how) if isinstance(host, AdaptedLayer) else ():
            if why := host.methods[adapter].unmergeable:  # type: ignore[attr-defined]
                raise MergeError(f"adapter {adapter!r} cannot be combined: {why}.")


def _held(host: AdapterHost, how: Combination) -> list[tuple[str, float]]:
    return [(name, weight) for name, weight in how.weights.items() if name in host.adapters]


# what each layer gets


def _piece(layer: AdaptedLayer, how: Combination) -> Piece:
    held = Held(layer, *map(list, zip(*_held(layer, how), strict=True)))
    if how.apart and held.factors is None:
        return Piece(tensors=_added_up(held, how))
    factors, error = _fitted(held, how)
    return Piece(replace(factors, A=layer.site.spread(factors.A)), error, held.bias())


@dataclass
class Held:
    """The adapters of a combination that stand on one layer."""

    layer: AdaptedLayer
    names: list[str]
    weights: list[float]

    def __post_init__(self) -> None:
        wide = torch.promote_types(self.layer.original()[0].dtype, torch.float32)
        self.methods = [self.layer.methods[n] for n in self.names]
        self.views = [self.layer.view(n, wide) for n in self.names]
        found = [m.factored(p) for m, p in zip(self.methods, self.views, strict=True)]
        self.factors = None if any(f is None for f in found) else [f for f in found if f is not None]

    @property
    def kinds(self) -> str:
        return listing(sorted({type(m).__name__ for m in self.methods}))

    def original(self) -> Weights:
        return widened(*self.layer.original())

    def changes(self) -> list[Tensor]:
        """What each adds to the weight, dense, `[cells, out, columns]`."""
        W, b = self.original()
        site, found = self.layer.site, [m.change(p, W, b)[0] for m, p in zip(self.methods, self.views, strict=True)]
        widest = max(found, key=Tensor.numel)
        return [site.cells(site.fit(change, widest)) for change in found]

    def bias(self) -> Tensor | None:
        """The weighted sum of what they add to the bias; None where that is nothing."""
        found = [m.change_bias(p, self.original) for m, p in zip(self.methods, self.views, strict=True)]
        parts = [db * weight for db, weight in zip(found, self.weights, strict=True) if db is not None]
        total = torch.stack(parts).sum(0) if parts else None
        return total if total is not None and total.any() else None


def _fitted(held: Held, how: Combination) -> Fitted:
    known, cut = held.factors, how.cut
    if known is not None and how.apart:
        return apart(known, held.weights, how.sum), 0.0
    if how.kind == "cat":
        if known is None:
            raise ConfigError(f"cat needs adapters that are products of factors; {held.kinds} is not. Use exact.")
        return stacked(known, held.weights), 0.0
    if known is not None and how.kind == "svd" and cut.rank is None and cut.energy is None:
        cut = replace(cut, rank=max(f.A.shape[1] for f in known))
    if known is not None and how.rule.prune is None and cut.clamp is None:
        return of_products(known, held.weights, cut)
    if known is not None and how.kind != "exact" and cut.rank is None and cut.energy is None:
        cut = replace(cut, rank=max(f.A.shape[1] for f in known))
    return of_matrices(how.sum(held.changes(), held.weights), cut)


def _added_up(held: Held, how: Combination) -> dict[str, Tensor]:
    if not all(m.additive for m in held.methods) or len({type(m) for m in held.methods}) > 1:
        raise ConfigError(
            f"combination_type={how.kind!r} combines the tensors of adapters one by one, which means nothing for "
            f"{held.kinds}; use exact, svd or another kind that ends in svd."
        )
    layer, found = held.layer, dict[str, Tensor]()
    for name in layer.specs[held.names[0]]:
        tensors = [layer.tensor(n, name).float() for n in held.names]
        found[name] = how.sum(tensors, held.weights)
    return found


def _module(host: Replacement, how: Combination) -> dict[str, Tensor]:
    """The tensors of a module that is trained whole: the original's and the combined change."""
    names, weights = map(list, zip(*_held(host, how), strict=True))
    base = host.pristine.state_dict()
    copies = [host.copies[n].state_dict() for n in names]
    changes = {k: [c[k].float() - t.float() for c in copies] for k, t in base.items() if t.is_floating_point()}
    return {k: base[k].float() + how.sum(c, weights) for k, c in changes.items()}


# the adapter that holds it


def _config(configs: Sequence[PeftConfig], how: Combination, pieces: Mapping[AdaptedLayer, Piece]) -> PeftConfig:
    keys = {layer: layer.keys[_held(layer, how)[0][0]] for layer in pieces}
    like = _united(configs, {key: layer.site for layer, key in keys.items()})
    held = {keys[layer]: (p.factors.A.shape[1], layer.site) for layer, p in pieces.items() if p.factors is not None}
    if not held:
        return like
    if len(held) < len(pieces):
        raise ConfigError(f"combination_type={how.kind!r} does not go for all layers of these adapters; use exact.")
    own = (lookup(c.peft_type) for c in configs)
    entry = next(e for known in (own, entries()) for e in known if issubclass(e.method, Method) and e.method.universal)
    return entry.method().holding(like, held, any(p.bias is not None for p in pieces.values()))


def _united(configs: Sequence[PeftConfig], sites: Mapping[str, Site]) -> PeftConfig:
    """A config that means every layer that one of these configs means: by their names, or path by path."""
    made = copy.deepcopy(configs[0])
    for name in ("modules_to_save", "target_parameters"):
        listed = dict.fromkeys(m for c in configs for m in getattr(c, name) or ())
        if listed:
            setattr(made, name, list(listed))
    alike = all(getattr(c, n) == getattr(made, n) for c in configs for n in NARROWING)
    united = {n: _names([getattr(c, n) for c in configs]) for n in made.unites}
    if alike and None not in united.values():
        vars(made).update(united)
        return made
    for name in NARROWING:
        if name in vars(made):
            setattr(made, name, None)
    made.target_modules = {path for path, site in sites.items() if not isinstance(site, Parameter)}
    vars(made).update({n: v for n, v in united.items() if n != "target_modules" and v is not None})
    return made


NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that take layers out of those that are named."""


def _names(given: Sequence[Names | None]) -> Names | None:
    """Names that mean all that each of these means; None where there are no such."""
    if all(isinstance(g, str) for g in given):
        return "|".join(f"({g})" for g in dict.fromkeys(map(str, given)))
    if any(isinstance(g, str) for g in given):
        return None
    return {name for g in given for name in g or ()}


@torch.no_grad()
def _fill(
    tuner: BaseTuner,
    name: str,
    pieces: Mapping[AdaptedLayer, Piece],
    modules: Mapping[Replacement, Mapping[str, Tensor]],
) -> dict[str, Fit]:
    fits = {}
    for layer, piece in pieces.items():
        for tensor, value in piece.tensors.items():
            layer.tensor(name, tensor).copy_(value)
        if piece.factors is not None:
            layer.methods[name].hold(layer.view(name), piece.factors, piece.bias)
            fits[layer.keys[name]] = Fit(piece.factors.A.shape[1], piece.error)
    for host, values in modules.items():
        for key, tensor in host.copies[name].state_dict().items():
            if key in values:
                tensor.copy_(values[key])
    return fits
