# SPDX-License-Identifier: Apache-2.0
"""Working out what an adapter does to a model: which places it takes, and with which tensors. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..errors import (
    ConfigError,
    HeadMissingWarning,
    NoMatchingPeftModuleError,
    PatternWarning,
    UnsupportedLayerError,
    listing,
    nearest,
    warn,
)
from ..patterns import allowance, endings
from ..registry import Entry, lookup
from ..weights.site import Attention, Embedding, Parameter, Site, site_of
from ..weights.storage import unusable
from . import ties
from .around import Block
from .host import AdapterHost, Shell, bare
from .inject import Item, Plan, Saved
from .layer import Branch
from .method import Method, Replace, View
from .target import HEADS_OF, Place, by_pattern, matches, resolve, targets, walk


def plan(model: nn.Module, config: PeftConfig, name: str, root: nn.Module | None = None) -> Plan:
    """Work out what an adapter does to a model. Raises where it cannot be done; the model is not touched.

    root: the module that holds what the adapter's layers share; the model itself unless given.

    Raises:
        NoMatchingPeftModuleError: nothing matches.
        UnsupportedLayerError: a target is of a kind that the method does not work on.
        ConfigError: a value does not fit a layer.
    """
    with allowance():
        return _planned(Plan(model, config, lookup(config.peft_type), name, model if root is None else root))


def _planned(made: Plan) -> Plan:
    model, config, entry = made.model, made.config, made.entry
    if issubclass(entry.method, (Method, Block)):
        entry.method().complete(config, model)
    places = list(walk(model))  # once: nothing changes while this plan is made
    found = _found(made, places) if _has_modules(config) else []
    together = config.ensure_weight_tying or (issubclass(entry.method, Method) and entry.method.follows_ties)
    if together:
        found += ties.partners(places, found)
    saved = _saved_places(places, config)
    if config.ensure_weight_tying:
        saved += ties.partners(places, saved)
    found = [p for p in found if not any(p.path == s.path or p.path.startswith(f"{s.path}.") for s in saved)]
    for place in found:
        made.items += _items(place, config, entry, model)
    made.items += _parameter_items(places, config.target_parameters or [], config, entry)
    _deal(made)
    made.items += [Item(p, None, None, Saved) for p in saved]
    tokens = _token_items(model, places, config, {p.path for p in saved})
    _check_shells([*made.items, *tokens])
    made.items += tokens
    _check_patterns(made)
    if config.ensure_weight_tying or not together:
        ties.check(places, [*found, *saved], config.ensure_weight_tying and not tokens)
    return made


def _token_items(model: nn.Module, places: list[Place], config: PeftConfig, saved: set[str]) -> list[Item]:
    """`trainable_token_indices`: rows of embeddings that are trained beside whatever else the adapter does.

    What shares an input embedding's weight follows it, unless it is named itself or saved whole.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    entry = lookup("TRAINABLE_TOKENS")
    named = dict(wanted) if isinstance(wanted, dict) else {_input_embedding(model, places): wanted}
    found = {name: _named_place(places, name) for name in named}
    taken = saved | {p.path for p in found.values()}
    items = []
    for name, place in found.items():
        tokens = entry.config(token_indices=list(named[name]), target_modules=[place.path])
        follow = ties.partners(places, [place]) if isinstance(site_of(place.bare), Embedding) else []
        for p in [place, *(f for f in follow if f.path not in taken)]:
            items += [replace(item, shell="token_adapter") for item in _items(p, tokens, entry, model)]
    return items


def _input_embedding(model: nn.Module, places: list[Place]) -> str:
    ask = getattr(model, "get_input_embeddings", None)
    standing: Any = ask() if callable(ask) else None
    path = next((p.path for p in places if standing is not None and p.bare is bare(standing)), None)
    if path is None:
        raise ConfigError(
            "trainable_token_indices is a list, which means the input embedding, but the model does not say which that "
            "is; give {name of the embedding: indices}."
        )
    return path


def _named_place(places: list[Place], name: str) -> Place:
    found = [p for p in places if matches(p.path, [name])]
    if not found:
        hint = nearest(name, {p.path.rpartition(".")[2] for p in places})
        raise NoMatchingPeftModuleError(
            f"trainable_token_indices has {name!r}, which is no module of the model{hint or '.'}"
        )
    return found[0]


def _check_shells(items: list[Item]) -> None:
    """Raise where token rows and another adapter would stand on one layer: which acts first would be anyone's guess."""
    rows = {i.place.path for i in items if i.shell or isinstance(i.place.module, Shell)}
    rest = {i.place.path for i in items if not i.shell or isinstance(i.place.module, AdapterHost)}
    if both := sorted(rows & rest):
        raise ConfigError(
            f"{listing(both)}: trainable_token_indices and another adaptation of the same layer do not go together; "
            "leave the layer out of target_modules and modules_to_save, or train it there and give no token indices."
        )


def _found(made: Plan, places: list[Place]) -> list[Place]:
    model, config, entry = made.model, made.config, made.entry
    names = resolve(config, entry, model, places)
    if not issubclass(entry.method, Block) or entry.method.boxed:
        made.targets = names
        return targets(model, config, names, places)
    if not isinstance(names, str):
        (config.target_modules,) = names  # one name, which is no regex; the file records it
    found = targets(model, config, {str(config.target_modules)}, places)
    chosen = entry.method().choose([p.path for p in found], config)
    return [p for p in found if p.path in chosen]


def plan_saved(model: nn.Module, config: PeftConfig, name: str) -> Plan:
    """The same for `modules_to_save` alone: what an adapter that is not in the layers does to a model."""
    made = Plan(model, config, lookup(config.peft_type), name, model)
    made.items += [Item(p, None, None, Saved) for p in _saved_places(list(walk(model)), config)]
    return made


def _has_modules(config: PeftConfig) -> bool:
    """Whether a config means modules at all: an empty `target_modules` beside parameters or tokens means none."""
    names = config.target_modules
    return not (names is not None and not names and (config.target_parameters or config.trainable_token_indices))


def _items(place: Place, config: PeftConfig, entry: Entry, model: nn.Module) -> list[Item]:
    if issubclass(entry.method, Replace):
        return [Item(place, None, None, entry.method)]
    if issubclass(entry.method, Block):
        block = entry.method()
        block.params(place.bare, config, model)  # raises where the block is not known
        return [Item(place, None, None, block=block)]
    site = site_of(place.bare)
    if isinstance(site_of(place.parent), Attention):
        return []  # read by the attention layer rather than called; it is adapted together with that
    if site is None or not isinstance(site, entry.sites):
        _check_usable(place)
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


def _check_usable(place: Place) -> None:
    if why := unusable(place.bare):
        raise UnsupportedLayerError(f"{place.path!r}, a {type(place.bare).__name__}, cannot be adapted: {why}.")


def _parameter_items(places: list[Place], wanted: Sequence[str], config: PeftConfig, entry: Entry) -> list[Item]:
    """The parameters that are meant, in the model's order: so those of one module stand inside each other in a file."""
    if wanted and Parameter not in entry.sites:
        raise UnsupportedLayerError(f"{entry.name} cannot adapt bare parameters (target_parameters={list(wanted)}).")
    for place in places if wanted else ():
        if any(matches(f"{place.path}.{name.rpartition('.')[2]}", [name]) for name in wanted):
            _check_usable(place)  # a kernel may keep what it takes otherwise than as parameters
    own = [(p, name, f"{p.path}.{name}") for p in places for name in p.bare._parameters] if wanted else []
    for name in wanted:
        if not any(matches(path, [name]) for _, _, path in own):
            hint = nearest(name.rpartition(".")[2], {parameter for _, parameter, _ in own})
            raise NoMatchingPeftModuleError(
                f"target_parameters has {name!r}, which is no parameter of the model{hint or '.'}"
            )
    items = []
    for place, parameter, path in own:
        if matches(path, list(wanted)) and not matches(path, config.exclude_modules):
            site = Parameter(place.module, parameter)
            items.append(Item(place, site, _branch(path, site, config, entry), parameter=parameter))
    return items


def _deal(made: Plan) -> None:
    """Settle what depends on all layers together."""
    held = {i.branch.key: (i.branch, i.site) for i in made.items if i.branch is not None and i.site is not None}
    sites = {key: site for key, (_, site) in held.items()}
    for method in {type(branch.method): branch.method for branch, _ in held.values()}.values():
        for key, settings in method.deal(made.config, sites).items():
            branch, site = held[key]
            branch.settings.update(settings)
            branch.specs = branch.method.params(site, _view(made.config, site, key, branch.settings))


def _view(config: PeftConfig, site: Site, key: str, settings: dict[str, Any]) -> View:
    return View(config, site, torch.float32, {**settings, "key": key})


def _branch(path: str, site: Site, config: PeftConfig, entry: Entry) -> Branch:
    method: Method = entry.method().pick(site, config, path)
    if method.reads_weight:
        site.check_readable(f"{entry.name} on {path!r}")
    settings = method.settings(site, config, path)
    return Branch(method, config, path, settings, method.params(site, _view(config, site, path, settings)))


def _saved_places(every: list[Place], config: PeftConfig) -> list[Place]:
    wanted = config.modules_to_save
    if not wanted:
        return []
    places = [p for p in every if matches(p.path, list(wanted))]
    idle = [name for name in wanted if not any(matches(p.path, [name]) for p in places)]
    heads = HEADS_OF.get(str(config.task_type), ())  # all that such a head may be called; a model has one of them
    if unknown := [name for name in idle if name not in heads]:
        ends = {p.path.rpartition(".")[2] for p in every}
        raise NoMatchingPeftModuleError(
            f"modules_to_save has {unknown[0]!r}, which is no module of the model{nearest(unknown[0], ends) or '.'}"
        )
    if heads and all(head in idle for head in heads if head in wanted):
        warn(
            HeadMissingWarning,
            f"task_type={str(config.task_type)!r} trains the head along, but the model has no {' or '.join(heads)}; name "
            "its head in modules_to_save.",
            stacklevel=7,
        )
    inside = {p.path for p in places}
    return [p for p in places if not any(p.path.startswith(f"{other}.") for other in inside)]


def _check_patterns(made: Plan) -> None:
    paths = [i.branch.key for i in made.items if i.branch is not None]
    for name, patterns in vars(made.config).items():
        if not (made.config.reads_patterns and name.endswith("_pattern") and isinstance(patterns, dict)):
            continue
        hits = {k: {p for p in paths if by_pattern({k: True}, p, False)} for k in patterns}
        if idle := [k for k, found in hits.items() if not found]:
            warn(PatternWarning, f"{name} has {listing(map(repr, idle))}, which match none of the adapted layers.")
        _check_overlaps(made.config, name, patterns, hits)


def _check_overlaps(config: PeftConfig, name: str, patterns: Mapping[str, Any], hits: Mapping[str, set[str]]) -> None:
    """Dispute two keys that give a layer different values, unless the first is an exception from the other."""
    for path in dict.fromkeys(p for found in hits.values() for p in sorted(found)):
        first, *others = (key for key, found in hits.items() if path in found)
        for key in others:
            exception = hits[first] < hits[key] or key in endings(first)
            if patterns[key] != patterns[first] and not exception:
                config.dispute(
                    f"{name} has {first!r} and {key!r}, which give {path!r} different values, and the first is no exception "
                    "from the other; the first that matches counts: let each layer have one, or put the narrower one first."
                )
                return
