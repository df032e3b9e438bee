# SPDX-License-Identifier: Apache-2.0
"""Putting an adapter into a model: planned first, applied after, so that all of it happens or none.

`plan` looks and raises; `Plan.build` makes and fills the tensors apart from the model; `Plan.apply` puts wrappers in
place; `Plan.undo` takes out what `apply` put in.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import NoMatchingPeftModuleError, PatternWarning, UnsupportedLayerError, listing, nearest, warn
from ..registry import Entry, lookup
from ..weights.site import Attention, Parameter, Site, site_of
from .host import AdapterHost, commons
from .layer import AdaptedLayer, Branch, relink
from .method import Method, Replace, Spec, View
from .replace import ModulesToSave, Replacement
from .target import Place, by_pattern, matches, resolve, targets, walk
from .tensors import Common, as_held, attribute


@dataclass
class Item:
    """One adapter on one place. A host that is there already takes the branch in; otherwise one is made."""

    place: Place
    site: Site | None
    branch: Branch | None
    replace: type[Replace] | None = None
    parameter: str | None = None
    copy: nn.Module | None = None
    host: AdapterHost | None = None
    made: bool = False


@dataclass
class Plan:
    """What putting one adapter into one model will do."""

    model: nn.Module
    config: PeftConfig
    entry: Entry
    name: str
    root: nn.Module
    items: list[Item] = field(default_factory=list)
    commons: dict[str, tuple[Spec, Tensor]] = field(default_factory=dict)

    def build(self, meta: bool = False, widen: bool = True, init: bool = True) -> Plan:
        """Make the tensors, on the layers' devices or on meta, and start them.

        widen: adapters of half-precision layers are kept in single precision. init: run the method's initialisation;
        without it only methods that derive something at load run theirs.
        """
        self._build_commons(meta and not init, widen)
        for item in self.items:
            if item.branch is not None and item.site is not None:
                build(item.branch, item.site, meta, widen, init)
            else:
                item.copy = _copied(item.place.bare, meta)
        return self

    def _build_commons(self, meta: bool, widen: bool) -> None:
        branches = {i.branch.key: i for i in self.items if i.branch is not None and i.site is not None}
        sites = {key: item.site for key, item in branches.items() if item.site is not None}
        for method in _methods([i.branch for i in branches.values() if i.branch is not None]):
            specs = method.commons(self.config, sites)
            kept = next(iter(sites.values())).weight if specs else None
            if kept is None:
                continue
            made = {n: as_held(_empty(s.shape, s, kept, meta, widen), s) for n, s in specs.items()}
            if not meta or any(not s.saved for s in specs.values()):
                made = {n: as_held(_empty(s.shape, s, kept, False, widen), s) for n, s in specs.items()}
                with torch.no_grad():
                    method.init_commons(self.config, made)
            self.commons.update({n: (specs[n], made[n]) for n in specs})

    def apply(self) -> Plan:
        """Put the built tensors into the model, making wrappers where there are none."""
        try:
            for item in self.items:
                self._apply(item)
            self._apply_commons()
            relink(self.model, self.name)
        except BaseException:
            self.undo()
            raise
        return self

    def _apply_commons(self) -> None:
        boxes: dict[str, Common] = {}
        for box_name, (spec, tensor) in self.commons.items():
            box = self.root._modules.get(box_name)
            if not isinstance(box, Common):
                box = Common()
                self.root.add_module(box_name, box)
            box.attach(self.name, tensor, spec)
            boxes[box_name] = box
        for item in self.items:
            if boxes and isinstance(item.host, AdaptedLayer):
                item.host.commons[self.name] = boxes

    def settle(self) -> None:
        """Write the base weights that initialisations asked for: the last step, once nothing else can fail."""
        for item in self.items:
            if item.branch is not None and item.branch.rebased is not None and isinstance(item.host, AdaptedLayer):
                item.host.site.write(item.branch.rebased, None)
                item.branch.rebased = None

    def _apply(self, item: Item) -> None:
        standing = getattr(item.place.parent, item.place.child)
        host = _find_host(standing, item)
        if host is None:
            host = _make_host(standing, item)
            _inherit(host, standing)
            setattr(item.place.parent, item.place.child, host)
            item.made = True
        item.host = host
        if item.branch is not None and isinstance(host, AdaptedLayer):
            host.attach(self.name, item.branch)
        elif isinstance(host, Replacement):
            host.attach(self.name, item.copy)

    def undo(self) -> None:
        """Take out what `apply` put in."""
        for _, box in commons(self.root):
            box.forget(self.name)
        for item in reversed(self.items):
            if item.host is None:
                continue
            if item.made:
                setattr(item.place.parent, item.place.child, item.host.base)
            elif self.name in item.host.adapters:
                item.host.delete_adapter(self.name)
            item.host, item.made = None, False


def plan(model: nn.Module, config: PeftConfig, name: str, root: nn.Module | None = None) -> Plan:
    """Work out what an adapter does to a model. Raises where it cannot be done; the model is not touched.

    root: the module that holds what the adapter's layers share; the model itself unless given.

    Raises:
        NoMatchingPeftModuleError: nothing matches.
        UnsupportedLayerError: a target is of a kind that the method does not work on.
        ConfigError: a value does not fit a layer.
    """
    entry = lookup(config.peft_type)
    made = Plan(model, config, entry, name, model if root is None else root)
    if issubclass(entry.method, Method):
        entry.method().complete(config, model)
    found = targets(model, config, resolve(config, entry, model)) if _has_modules(config) else []
    if issubclass(entry.method, Method) and entry.method.follows_ties:
        found += _tied_with(model, found)
    saved = _saved_places(model, config)
    for place in found:
        if not any(place.path == s.path or place.path.startswith(f"{s.path}.") for s in saved):
            made.items += _items(place, config, entry)
    for path in config.target_parameters or ():
        made.items += _parameter_items(model, path, config, entry)
    made.items += [Item(p, None, None, _Saved) for p in saved]
    _check_patterns(made)
    return made


class _Saved(Replace):
    """`modules_to_save`, as a kind of replacement."""

    copies, original, on_disk = "modules_to_save", "original_module", False


def _tied_with(model: nn.Module, found: list[Place]) -> list[Place]:
    """The other places whose weight is one of these places'."""
    weights = {id(p.bare._parameters.get("weight")) for p in found} - {id(None)}
    known = {id(p.bare) for p in found}
    return [p for p in walk(model) if id(p.bare) not in known and id(p.bare._parameters.get("weight")) in weights]


def _has_modules(config: PeftConfig) -> bool:
    """Whether a config means modules at all: an empty `target_modules` beside parameters or tokens means none."""
    names = config.target_modules
    return not (names is not None and not names and (config.target_parameters or config.trainable_token_indices))


def _items(place: Place, config: PeftConfig, entry: Entry) -> list[Item]:
    if issubclass(entry.method, Replace):
        return [Item(place, None, None, entry.method)]
    site = site_of(place.bare)
    if isinstance(site_of(place.parent), Attention):
        return []  # read by the attention layer rather than called; it is adapted together with that
    if site is None or not isinstance(site, entry.sites):
        if isinstance(config.target_modules, str) and any(True for _ in place.bare.children()):
            return []  # a regex that also hits containers means what is inside them
        kinds = ", ".join(s.__name__ for s in entry.sites)
        raise UnsupportedLayerError(
            f"{entry.name} cannot adapt {place.path!r}, a {type(place.bare).__name__}; it works on {kinds}. "
            "Name other target_modules, or leave this one out by exclude_modules."
        )
    items = [Item(place, site, _branch(place.path, site, config, entry))]
    if isinstance(site, Attention):
        inner = place.bare.get_submodule("out_proj")
        within = Place(f"{place.path}.out_proj", inner, place.bare, "out_proj")
        inner_site = site_of(within.bare)
        assert inner_site is not None
        items.append(Item(within, inner_site, _branch(within.path, inner_site, config, entry)))
    return items


def _parameter_items(model: nn.Module, wanted: str, config: PeftConfig, entry: Entry) -> list[Item]:
    if Parameter not in entry.sites:
        raise UnsupportedLayerError(f"{entry.name} cannot adapt bare parameters (target_parameters={wanted!r}).")
    items, seen = [], []
    for place in walk(model):
        for parameter in place.bare._parameters:
            path = f"{place.path}.{parameter}"
            seen.append(path)
            if matches(path, [wanted]) and not matches(path, config.exclude_modules):
                site = Parameter(place.module, parameter)
                items.append(Item(place, site, _branch(path, site, config, entry), parameter=parameter))
    if not items:
        ends = {p.rpartition(".")[2] for p in seen}
        hint = nearest(wanted.rpartition(".")[2], ends)
        raise NoMatchingPeftModuleError(
            f"target_parameters has {wanted!r}, which is no parameter of the model{hint or '.'}"
        )
    return items


def _branch(path: str, site: Site, config: PeftConfig, entry: Entry) -> Branch:
    method: Method = entry.method().pick(site, config, path)
    settings = method.settings(site, config, path)
    view = View(config, site, torch.float32, {**settings, "key": path})
    return Branch(method, config, path, settings, method.params(site, view))


def build(branch: Branch, site: Site, meta: bool, widen: bool, init: bool) -> None:
    """Allocate a branch's tensors and start them."""
    kept = site.weight
    dtype = adapter_dtype(kept, widen)
    run = init or branch.method.derived(branch.config)
    for tensor_name, spec in branch.specs.items():
        shape = branch.method.stacked(tensor_name, spec, site.stack) if site.stack else spec.shape
        branch.tensors[tensor_name] = as_held(_empty(shape, spec, kept, meta and not run, widen), spec)
    if run and kept.device.type != "meta":
        with torch.no_grad():
            branch.rebased = branch.method.init(_start_view(branch, site, dtype))


def adapter_dtype(kept: Tensor, widen: bool) -> torch.dtype:
    """What an adapter is kept in on a layer: the layer's own dtype, single precision where that is narrow or packed."""
    dtype = kept.dtype if kept.is_floating_point() and kept.dtype.itemsize > 1 else torch.float32
    return torch.float32 if widen and dtype.itemsize < 4 else dtype


def _empty(shape: tuple[int, ...], spec: Spec, kept: Tensor, meta: bool, widen: bool) -> Tensor:
    return torch.empty(shape, dtype=spec.dtype or adapter_dtype(kept, widen), device="meta" if meta else kept.device)


def _methods(branches: list[Branch]) -> list[Method]:
    """One method of each kind among the branches."""
    return list({type(b.method): b.method for b in branches}.values())


def _start_view(branch: Branch, site: Site, dtype: torch.dtype) -> View:
    """The view that an initialisation fills: a stack of experts is filled matrix by matrix alike."""
    values: dict[str, object] = {**branch.settings, "key": branch.key}
    for tensor_name, tensor in branch.tensors.items():
        values[attribute(tensor_name)] = tensor.detach()
    return View(branch.config, site, dtype, values)


def _copied(module: nn.Module, meta: bool) -> nn.Module:
    if not meta:
        return copy.deepcopy(module)
    memo = {id(t): _on_meta(t) for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _find_host(standing: nn.Module, item: Item) -> AdapterHost | None:
    """The wrapper already here that this item goes into."""
    while isinstance(standing, AdapterHost):
        if item.replace is not None and isinstance(standing, Replacement):
            return standing
        if item.branch is not None and isinstance(standing, AdaptedLayer):
            named = standing.site.name if isinstance(standing.site, Parameter) else None
            if named == item.parameter:
                return standing
        standing = standing.base
    return None


def _make_host(standing: nn.Module, item: Item) -> AdapterHost:
    if item.replace is _Saved:
        return ModulesToSave(standing)
    if item.replace is not None:
        return Replacement(standing, item.replace.original, item.replace.copies, item.replace.on_disk)
    assert item.site is not None
    site = Parameter(standing, item.parameter) if item.parameter else item.site
    return AdaptedLayer(standing, site)


def _inherit(host: AdapterHost, standing: nn.Module) -> None:
    host.train(standing.training)
    if isinstance(standing, AdapterHost):
        host.set_disabled(standing.disable_adapters)


def _saved_places(model: nn.Module, config: PeftConfig) -> list[Place]:
    wanted = config.modules_to_save
    if not wanted:
        return []
    places = [p for p in walk(model) if matches(p.path, list(wanted))]
    for name in wanted:
        if not any(matches(p.path, [name]) for p in places):
            ends = {p.path.rpartition(".")[2] for p in walk(model)}
            raise NoMatchingPeftModuleError(
                f"modules_to_save has {name!r}, which is no module of the model{nearest(name, ends) or '.'}"
            )
    inside = {p.path for p in places}
    return [p for p in places if not any(p.path.startswith(f"{other}.") for other in inside)]


def _check_patterns(made: Plan) -> None:
    paths = [i.branch.key for i in made.items if i.branch is not None]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(made.config, name, None) or {}
        idle = [k for k in patterns if not any(by_pattern({k: True}, p, False) for p in paths)]
        if idle:
            warn(PatternWarning, f"{name} has {listing(map(repr, idle))}, which match none of the adapted layers.")
