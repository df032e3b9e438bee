# SPDX-License-Identifier: Apache-2.0
"""Putting an adapter into a model: planned first, applied after, so that all of it happens or none.

`planning.plan` looks and raises; `Plan.build` makes and fills the tensors apart from the model; `Plan.apply` puts
wrappers in place; `Plan.undo` takes out what `apply` put in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import limits
from ..config import Names, PeftConfig
from ..errors import ConfigError, UnsupportedLayerError
from ..machine import main_memory
from ..registry import Entry
from ..weights.offloaded import duplicate, unhooked
from ..weights.site import Parameter, Site
from ..weights.whole import made_alike, shape_of, shared_out
from .around import Block
from .block import BlockHost, host_for, started
from .host import AdapterHost, Shell, base_parameters, home_of, standing
from .layer import AdaptedLayer, Branch
from .lifecycle import relink
from .merging import restored_on_error
from .method import Method, Replace, Spec, View
from .replace import ModulesToSaveWrapper, Replacement
from .target import Place
from .tensors import Common, Networks, adapter_dtype, as_held, attribute, common_of, networks_of, split


@dataclass
class Item:
    """One adapter on one place. A host that is there already takes the branch in; otherwise one is made."""

    place: Place
    site: Site | None
    branch: Branch | None
    replace: type[Replace] | None = None
    block: Block | None = None
    tensors: tuple[dict[str, Spec], dict[str, Tensor]] = ({}, {})
    parameter: str | None = None
    copy: nn.Module | None = None
    shell: str | None = None
    """What the adapted layer is called inside a wrapper of its own; None where it takes the place itself."""
    host: AdapterHost | None = None
    made: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Where a new host was put: everywhere that its module stood."""


@dataclass
class Plan:
    """What putting one adapter into one model will do."""

    model: nn.Module
    config: PeftConfig
    entry: Entry
    name: str
    root: nn.Module
    targets: Names | None = None
    """`target_modules` as resolved for the model."""
    items: list[Item] = field(default_factory=list)
    commons: dict[str, tuple[Spec, Tensor]] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    _homes: dict[int, list[tuple[nn.Module, str]]] | None = None

    def build(self, meta: bool = False, widen: bool = True, init: bool = True) -> Plan:
        """Make the tensors, on the layers' devices or on meta, and start them.

        widen: adapters of half-precision layers are kept in single precision. init: run the method's initialisation;
        without it only methods that derive something at load run theirs.
        """
        if not init:
            self._check_size()
        self._build_commons(meta and not init, widen)
        memo: dict[int, Tensor] = {}
        for item in self.items:
            if item.branch is not None and item.site is not None:
                build(item.branch, item.site, meta, widen, init)
            elif item.block is not None:
                item.tensors = started(item.block, item.place.bare, self.config, self.model, meta, widen)
            else:
                item.copy = _copied(item.place.bare, meta, memo if self.config.ensure_weight_tying else {})
        self.networks = self._networks(init)
        made_alike(self._tensors(), self.model)
        return self

    def _networks(self, init: bool) -> dict[str, nn.Module]:
        block = next((i.block for i in self.items if i.block is not None), None)
        return {} if block is None else block.networks(self.config, self.model, init)

    def _tensors(self) -> Iterator[Tensor]:
        """All that was made, always in the same order."""
        for item in self.items:
            yield from item.tensors[1].values() if item.branch is None else item.branch.tensors.values()
        yield from (tensor for _, tensor in self.commons.values())
        yield from (p for network in self.networks.values() for p in network.parameters())

    def _check_size(self) -> None:
        """Raise `ConfigError` where a saved adapter's config asks for absurdly more numbers than its base has."""
        branches = [(i.branch, i.site) for i in self.items if i.branch is not None and i.site is not None]
        sites = {branch.key: site for branch, site in branches}
        wanted = [s.shape for method in self.methods() for s in method.commons(self.config, sites).values()]
        for branch, site in branches:
            wanted += [(max(1, site.stack), *spec.shape) for spec in branch.specs.values()]
        with torch.device("meta"):
            wanted += [p.shape for network in self._networks(init=False).values() for p in network.parameters()]
        there = sum(shape_of(p).numel() for p in base_parameters(self.model))
        most = limits.FREE_ELEMENTS + limits.ELEMENTS_SHARE * there
        if (count := sum(map(math.prod, wanted))) > most:
            raise ConfigError(
                f"the adapter's config asks for {count:,} numbers, absurdly more than its base has: it is damaged, or made to "
                "take memory. If it is right, raise graftlet.limits.FREE_ELEMENTS."
            )

    def methods(self) -> list[Method]:
        """One method of each kind among the adapter's layers."""
        return list({type(i.branch.method): i.branch.method for i in self.items if i.branch is not None}.values())

    def _build_commons(self, meta: bool, widen: bool) -> None:
        for method, sites, specs in self._sharing():
            like, run = next(iter(sites.values())), not meta or any(not s.saved for s in specs.values())
            dtype, place = adapter_dtype(like.dtype, widen), like.device if run else torch.device("meta")
            made = {n: as_held(_empty(s.shape, s.dtype or dtype, place), s) for n, s in specs.items()}
            if run:
                with torch.no_grad():
                    method.init_commons(self.config, made)
            self.commons.update({n: (specs[n], made[n]) for n in specs})

    def _sharing(self) -> Iterator[tuple[Method, dict[str, Site], dict[str, Spec]]]:
        """The methods whose layers share tensors, with the layers' sites and what they share."""
        branches = {i.branch.key: i for i in self.items if i.branch is not None and i.site is not None}
        sites = {key: item.site for key, item in branches.items() if item.site is not None}
        for method in self.methods():
            if specs := method.commons(self.config, sites):
                yield method, sites, specs

    @torch.no_grad()
    def share_on(self, device: torch.device | str) -> None:
        """Put what the layers share on a device, made anew: the layers themselves may be on meta, and stay there."""
        for method, _, specs in self._sharing():
            empty = {n: torch.empty_like(self.commons[n][1], device=device) for n in specs}
            made = {n: as_held(t, specs[n]) for n, t in empty.items()}
            method.init_commons(self.config, made)
            self.commons.update({n: (specs[n], made[n]) for n in specs})
        self._apply_commons()

    def apply(self) -> Plan:
        """Put the built tensors into the model, making wrappers where there are none."""
        try:
            for item in self.items:
                self._apply(item)
            self._apply_commons()
            self._apply_networks()
            relink(self.model, self.name)
        except BaseException:
            self.undo()
            raise
        return self

    def _apply_commons(self) -> None:
        groups: dict[str, dict[str, Common]] = {"": {}}
        for common_name, (spec, tensor) in self.commons.items():
            common_name, _, group = common_name.partition("/")
            box_name, entry = split(common_name)
            box = common_of(self.root, box_name, group)
            box.attach(self.name, entry or "", tensor, spec)
            groups.setdefault(group, {})[box_name] = box
        for item in self.items:
            if self.commons and item.branch is not None and isinstance(item.host, AdaptedLayer):
                own = groups.get(item.branch.method.group(item.branch.key), {})
                item.host.commons[self.name] = {**groups[""], **own}

    def _apply_networks(self) -> None:
        held: dict[str, Networks] = {}
        for network_name, network in self.networks.items():
            held[network_name] = networks_of(self.root, network_name)
            held[network_name].hold(self.name, network)
        blocks = [i.host for i in self.items if isinstance(i.host, BlockHost)]
        for host in blocks:
            host.networks.update(held)

    def settle(self) -> None:
        """Write the base weights that initialisations asked for: the last step. All of them, or none where one fails."""
        written: list[AdaptedLayer] = []
        with ExitStack() as before:
            for item in self.items:
                if item.branch is not None and item.branch.rebased is not None and isinstance(item.host, AdaptedLayer):
                    before.enter_context(restored_on_error(item.host.site))
                    item.host.site.write(item.branch.rebased, None)
                    item.branch.rebased = None  # its memory goes as that of what is saved comes
                    written.append(item.host)
        for host in written:
            host.rebased.add(self.name)

    def _apply(self, item: Item) -> None:
        module = getattr(item.place.parent, item.place.child)
        host = _find_host(module, item)
        if host is None:
            host = _make_host(module, item)
            _inherit(host, module)
            outer = host if item.shell is None else Shell(item.shell, host).train(module.training)
            for parent, child in self._stands(item.place, module):
                setattr(parent, child, outer)
                item.made.append((parent, child))
        item.host, host.home = host, home_of(self.model)
        if item.branch is not None and isinstance(host, AdaptedLayer):
            host.attach(self.name, item.branch)
        elif isinstance(host, Replacement):
            host.attach(self.name, item.copy, self._leader(item))
        elif isinstance(host, BlockHost):
            blocks = [i for i in self.items if i.block is not None]
            host.attach(self.name, self.config, item.tensors, blocks.index(item))

    def activate(self, active: list[str], learn: bool) -> None:
        """Let new wrappers follow the adapters that are active, and the new adapter learn or not."""
        for item in self.items:
            if item.host is not None:
                if item.made or not item.host.active_adapters:
                    item.host.follow(active)
                item.host.set_requires_grad(self.name, learn)
        for box in standing(self.root)[1]:
            box.set_requires_grad(self.name, learn)

    def _leader(self, item: Item) -> Replacement | None:
        """The first host whose copy shares a parameter with this item's."""
        mine = {id(p) for p in item.copy.parameters()} if item.copy is not None else set()
        for other in self.items[: self.items.index(item)]:
            theirs = other.copy.parameters() if other.copy is not None else ()
            if isinstance(other.host, Replacement) and any(id(p) in mine for p in theirs):
                return other.host
        return None

    def _stands(self, place: Place, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Everywhere that a module stands: one that a model uses in two places is adapted in both."""
        if self._homes is None:
            self._homes = {}
            for parent in self.model.modules():
                for child, inner in parent._modules.items():
                    self._homes.setdefault(id(inner), []).append((parent, child))
        homes = self._homes.get(id(module), [])
        return homes if len(homes) > 1 else [(place.parent, place.child)]

    def undo(self) -> None:
        """Take out what `apply` put in."""
        for box in standing(self.root)[1]:
            box.forget(self.name)
        for item in reversed(self.items):
            if item.host is None:
                continue
            for parent, child in item.made:
                setattr(parent, child, item.host.base)
            if not item.made and self.name in item.host.adapters:
                item.host.delete_adapter(self.name)
            item.host, item.made = None, []


class Saved(Replace):
    """`modules_to_save`, as a kind of replacement."""

    copies, original, on_disk = "modules_to_save", "original_module", False


def build(branch: Branch, site: Site, meta: bool, widen: bool, init: bool) -> None:
    """Allocate a branch's tensors and start them."""
    dtype, device = adapter_dtype(site.dtype, widen), site.device
    run = init or branch.method.derived(branch.config)
    place = torch.device("meta") if meta and not run else device
    for tensor_name, spec in branch.specs.items():
        shape = branch.method.stacked(tensor_name, spec, site.stack) if site.stack else spec.shape
        branch.tensors[tensor_name] = as_held(_empty(shape, spec.dtype or dtype, place), spec)
    if run and device.type != "meta":
        with torch.no_grad():
            branch.rebased = branch.method.init(_start_view(branch, site, dtype))
        if branch.rebased is not None:
            site.check_writable()  # now, when nothing is changed yet


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size > (main_memory() or math.inf):
        # the system may promise it, and then end the process
        raise _too_large(shape, size, device)
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _too_large(shape, size, device) from error


def _too_large(shape: tuple[int, ...], size: int, device: torch.device) -> ConfigError:
    return ConfigError(
        f"an adapter's tensor of shape {tuple(shape)} takes {size / 2**30:,.0f} GiB, more than {device} has: "
        "lower the rank, or whatever sets that size."
    )


def _start_view(branch: Branch, site: Site, dtype: torch.dtype) -> View:
    """The view that an initialisation fills: a stack of experts is filled matrix by matrix alike."""
    values: dict[str, object] = {**branch.settings, "key": branch.key}
    for tensor_name, tensor in branch.tensors.items():
        values[attribute(tensor_name)] = tensor.detach()
    return View(branch.config, site, dtype, values)


def _copied(module: nn.Module, meta: bool, tensors: dict[int, Tensor]) -> nn.Module:
    """A trainable copy of a module; `tensors` are the copies made so far, which tied modules share.

    Raises `UnsupportedLayerError` where an engine keeps the module in parts, and has changed how it is called; and where
    its numbers are packed.
    """
    if not all(p.is_floating_point() or p.is_complex() for p in module.parameters()):
        raise UnsupportedLayerError(
            f"a {type(module).__name__}'s numbers are packed and cannot learn, so it cannot be copied to be trained whole; "
            "leave it out of what is quantised (transformers: llm_int8_skip_modules), or out of modules_to_save."
        )
    if any(map(shared_out, module.parameters())):
        raise UnsupportedLayerError(
            f"a {type(module).__name__} that is kept in parts, one a process, cannot be copied to be trained whole; put "
            "the adapter on before an engine shards the model, or leave the module out of modules_to_save."
        )
    for owner in module.modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and id(tensor) not in tensors:
                tensors[id(tensor)] = _on_meta(tensor) if meta else duplicate(owner, name, tensor)
    return unhooked(module, dict(tensors))


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _find_host(module: nn.Module, item: Item) -> AdapterHost | None:
    """The wrapper already here that this item goes into."""
    if item.shell is not None:
        return module.inner if isinstance(module, Shell) else None
    while isinstance(module, AdapterHost):
        if item.replace is not None and isinstance(module, Replacement):
            return module
        if isinstance(module, BlockHost) and type(module.method) is type(item.block):
            return module
        if item.branch is not None and isinstance(module, AdaptedLayer):
            named = module.site.name if isinstance(module.site, Parameter) else None
            if named == item.parameter:
                return module
        module = module.base
    return None


def _make_host(module: nn.Module, item: Item) -> AdapterHost:
    if item.replace is Saved:
        return ModulesToSaveWrapper(module)
    if item.block is not None:
        return host_for(module, item.block)
    if item.replace is not None:
        return Replacement(module, item.replace.original, item.replace.copies, item.replace.on_disk)
    assert item.site is not None
    site = Parameter(module, item.parameter) if item.parameter else item.site
    return AdaptedLayer(module, site)


def _inherit(host: AdapterHost, module: nn.Module) -> None:
    host.train(module.training)
    if isinstance(module, AdapterHost):
        host.set_disabled(module._disabled)
