# SPDX-License-Identifier: Apache-2.0
"""Weights that several layers of a model share: which they are, who is adapted along with whom, sharing them again.

The usual pair is a model's input embedding and its output head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..errors import TieIdleWarning, TieWarning, listing, warn
from ..weights.site import Embedding, site_of
from .target import Place, walk
from .tensors import Common


@dataclass
class Group:
    """One parameter of the base model, and the places that use it, as `(path, attribute)`."""

    parameter: nn.Parameter
    places: list[tuple[str, str]] = field(default_factory=list)


def tied(model: nn.Module) -> list[Group]:
    """The groups of places that share one parameter of the base model, by the model's own paths."""
    return _tied(walk(model))


def _tied(places: Iterable[Place]) -> list[Group]:
    uses: dict[int, list[tuple[nn.Parameter, str, str]]] = {}
    for place in places:
        module = place.bare
        for name, parameter in () if isinstance(module, Common) else module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((parameter, place.path, name))
    shared = [found for found in uses.values() if len(found) > 1]
    return [Group(found[0][0], [(path, name) for _, path, name in found]) for found in shared]


def retie(model: nn.Module, groups: list[Group]) -> bool:
    """Share again the weights of each group that are still equal; returns whether all of them were.

    `model` has no wrappers any more; `groups` are those of before.
    """
    whole = True
    for group in groups:
        owners = [(model.get_submodule(path), name) for path, name in group.places]
        first = getattr(*owners[0])
        for module, name in owners[1:]:
            held = getattr(module, name)
            if held is first:
                continue
            if held.shape == first.shape and held.equal(first):
                setattr(module, name, first)
            else:
                whole = False
    return whole


def partners(places: list[Place], found: list[Place]) -> list[Place]:
    """Of all places of a model, the others whose weight is one of these places'."""
    weights = {id(p.bare._parameters.get("weight")) for p in found} - {id(None)}
    known = {id(p.bare) for p in found}
    return [p for p in places if id(p.bare) not in known and id(p.bare._parameters.get("weight")) in weights]


def check(places: list[Place], adapted: Iterable[Place], together: bool) -> None:
    """Warn where a place shares its weight with an embedding or head that is not adapted just as it is.

    places: all of the model's. together: the config asks for that, so there must be something to do it on.
    """
    wanted = {id(p.bare): p for p in adapted}
    modules = {p.path: p.bare for p in places}
    shared = [(id(group.parameter), [path for path, _ in group.places]) for group in _tied(places)]
    groups = {key: paths for key, paths in shared if any(isinstance(site_of(modules[p]), Embedding) for p in paths)}
    hit = [p for p in wanted.values() if id(p.bare._parameters.get("weight")) in groups]
    if together and not hit:
        why = "no adapted layer is one of those that share a weight" if groups else "no layers of the model share one"
        warn(TieIdleWarning, f"ensure_weight_tying=True, but {why}; it has no effect.", stacklevel=6)
    if not together and hit:
        paths = sorted({path for p in hit for path in groups[id(p.bare._parameters["weight"])]})
        warn(
            TieWarning,
            f"{listing(paths)} share one weight, and {listing(p.path for p in hit)} is adapted on its own: they differ "
            "once it is merged. ensure_weight_tying=True adapts them alike, where the method can.",
            stacklevel=6,
        )
