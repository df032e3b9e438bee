# SPDX-License-Identifier: Apache-2.0
"""Two key-value caches in step: what is done to the rows and lengths of one is done to the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ...core.prompt import CACHES

BOTH = ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")
"""What changes a cache's rows or lengths."""

KEPT = "_graftlet_follower"


def pair(cache: Any, owner: str, follower: Any) -> None:
    """Let `follower`, another network's cache, go along with `cache`; `owner` says whose it is."""
    if not issubclass(type(cache), Paired):
        cache.__class__ = _paired(type(cache))
    cache.__dict__[KEPT] = (owner, follower)


def follower(cache: Any, owner: str) -> Any:
    """The cache that goes along with this one, if it is the owner's; None otherwise."""
    held, found = ("", None) if cache is None else cache.__dict__.get(KEPT, ("", None))
    return found if held == owner else None


class Paired:
    """A cache with another one that goes along."""

    @property
    def is_compileable(self) -> bool:
        """Two caches of different sizes are no single graph's input."""
        return False


@functools.cache
def _paired(kind: type) -> type:
    made = {name: _both(getattr(kind, name), name) for name in BOTH if hasattr(kind, name)}
    return type(kind.__name__, (Paired, kind), made)


def _both(own: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(own)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        getattr(self.__dict__[KEPT][1], name)(*args, **kwargs)
        return own(self, *args, **kwargs)

    return both


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or outputs; None where there is none."""
    return next((found for name in CACHES if (found := given.get(name)) is not None), None)
