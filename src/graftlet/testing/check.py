# SPDX-License-Identifier: Apache-2.0
"""Holding a method of one's own to the laws."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.method import Method, Replace
from ..errors import ConfigError, MergeError, StartWarning, UnknownMethodError, UnsupportedLayerError, listing
from ..registry import Entry, entries
from .benches import BENCHES, WHOLE, Bench
from .case import Case
from .laws import LAWS, ONCE, Law
from .running import adapted


def check_method(
    method: type,
    settings: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    sites: Sequence[type] | None = None,
    *,
    other: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    neutral: bool = True,
    rebased: bool = False,
    idle: Sequence[str] = (),
) -> dict[str, int]:
    """Check that a registered method keeps every law, on tiny layers of each kind that it works on.

    The laws: a new adapter changes nothing, unless the method says otherwise; the forward is the operation with the
    transformed weight; merged, it acts as unmerged, and unmerging restores the bits; disabled, it is the base; two
    adapters act by the declared law; each row of a mixed batch is as if its adapter were alone; gradients reach what was
    declared and nothing else; saved, loaded, copied, pickled, made without memory and compiled, it is the same. It takes
    some seconds a kind of layer; compilation, the slowest, is checked on the first layer of each set of settings.

    A method beside the layers (a prompt) or on blocks is checked on a tiny decoder of transformers, by the laws that have no
    weight in them.

    Args:
        method: the class that `@method` registered.
        settings: fields of its config that fit layers of 8 inputs and 12 outputs, or several such sets; none for the
            config's defaults.
        call: what a call needs beside its inputs.
        sites: the kinds of layer to check, of those it is registered for; None for all.
        other: fields that a second adapter must have otherwise to stand beside the first.
        neutral: False where these settings change the model from the start although the method's default does not.
        rebased: True where they start by moving a part of the base weight into the adapter.
        idle: parts of the names of tensors that the format has and nothing teaches.

    Returns:
        On how many layers and settings each law was checked; 0 where the method has nothing that the law speaks of.

    Raises:
        AssertionError: laws are broken; it names each, with the layer and what was expected.
        UnknownMethodError: the class is not registered.
        ConfigError: it acts on no layers, or `sites` has a kind that it is not registered for.
    """
    entry = _entry(method)
    kinds = _kinds(entry, sites)
    facts = {"other": other or {}, "call": call or {}, "neutral": neutral, "rebased": rebased, "idle": tuple(idle)}
    many = [settings] if isinstance(settings, Mapping) else list(settings) or [{}]
    counts, broken = {law.__name__: 0 for law in LAWS}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StartWarning)
        for number, values in enumerate(many):
            cases = list(_cases(entry, kinds, {"values": values, "setting": str(number), "first": not number, **facts}))
            for case in cases:
                for law, error in _broken(case, LAWS if case is cases[0] else LAWS.keys() - ONCE, counts):
                    broken.append((f"{law}, {case.bench.name} with {dict(values)}", error))
    if broken:
        said = "\n\n".join(f"{where}:\n{type(e).__name__}: {e}" for where, e in broken)
        raise AssertionError(f"{entry.name} breaks laws on {len(broken)} counts.\n\n{said}") from broken[0][1]
    return counts


def _entry(method: type) -> Entry:
    found = next((e for e in entries() if e.method is method), None)
    if found is None:
        raise UnknownMethodError(f"{method.__name__} is not registered; put @method(name, Config, sites=...) on it.")
    return found


def benches(entry: Entry) -> list[Bench]:
    """What a method is checked on: layers, or a whole model for one that acts beside them or on blocks."""
    return list((BENCHES if issubclass(entry.method, (Method, Replace)) else WHOLE).values())


def _kinds(entry: Entry, sites: Sequence[type] | None) -> list[type]:
    known = {bench.kind for bench in benches(entry)}
    allowed = set(entry.sites) if issubclass(entry.method, Method) else known
    asked = set(sites or allowed & known)
    if wrong := [k.__name__ for k in asked if k not in allowed & known]:
        names = listing(sorted(k.__name__ for k in allowed & known))
        raise ConfigError(f"sites has {listing(wrong)}, but {entry.name} can be checked on: {names or 'nothing'}.")
    if not asked:
        raise ConfigError(f"{entry.name} is registered for no kind of layer; give `sites` to @method.")
    return list(asked)


def _cases(entry: Entry, kinds: list[type], facts: dict[str, Any]) -> Iterator[Case]:
    for bench in benches(entry):
        if bench.kind in kinds:
            case = Case(entry, bench=bench, **facts)
            fitted = _fitted(case) if bench.narrow else case
            if fitted is not None:
                yield fitted


def _fitted(case: Case) -> Case | None:
    """A case on a layer that may rightly refuse an adapter (None), or the merged form of one."""
    try:
        adapted(case).merge_adapter()
    except (ConfigError, UnsupportedLayerError):
        return None
    except MergeError:
        return replace(case, mergeable=False)
    except Exception:
        return case  # the laws will tell of it
    return case


def _broken(case: Case, laws: Collection[Law], counts: dict[str, int]) -> Iterator[tuple[str, Exception]]:
    """The laws that a case breaks, with what they raised; `counts` learns of all that were checked."""
    for law in LAWS:
        if law in laws and LAWS[law](case):
            counts[law.__name__] += 1
            try:
                law(case)
            except Exception as error:  # whatever a method's own code raises is a law it does not keep
                yield law.__name__, error
