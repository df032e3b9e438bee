# SPDX-License-Identifier: Apache-2.0
"""Whether a regex out of a config matches a path, in bounded time whatever the regex is.

`re` backtracks, and takes exponential time for some patterns. Those that provably cannot are left to it. Any other one is
matched by the set of positions that each of its parts can reach: the language is the same, the time polynomial, and
counted. Single characters and places are still matched by `re` itself, so that flags and classes mean what they mean there.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import limits
from .errors import ConfigError

try:  # the standard library's own parser of regexes
    from re import _compiler, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_parse as _parser

ONE = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"}
"""Parts that match one character, or a place between two."""
REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}
TYPICAL = 200
"""The length of a long path, by which a pattern's steps are estimated."""


def endings(path: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


class _Allowance(threading.local):
    left: float = math.inf


_allowance = _Allowance()


@contextmanager
def allowance() -> Iterator[None]:
    """All patterns that are matched by sets until the block ends share a number of steps."""
    before, _allowance.left = _allowance.left, min(_allowance.left, limits.MAX_ALL_STEPS)
    try:
        yield
    finally:
        _allowance.left = before


def fullmatch(pattern: str, text: str) -> bool:
    """Whether a regex matches the whole of a text. Raises `ConfigError` where it is none, or takes too many steps."""
    quick = compiled(pattern)
    if quick is not None and len(text) <= TYPICAL:
        return quick.fullmatch(text) is not None
    return len(text) in _Positions(pattern, text).ends()


def search(pattern: str, text: str) -> bool:
    """Whether a regex matches some part of a text. Raises as `fullmatch` does."""
    return fullmatch(rf"(?s:.*)(?:{pattern})(?s:.*)", text)


def check(pattern: str, what: str, shown: str | None = None) -> None:
    """Raise `ConfigError`, beginning with `what`, where a pattern is no valid regex, or none that can be bounded.

    shown: the pattern as it was given.
    """
    try:
        _parsed(pattern if shown is None else shown)
        if compiled(pattern) is None:
            _Positions(pattern, "").ends()
    except ConfigError as error:
        raise ConfigError(f"{what} has {error.args[0]}") from None


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str] | None:
    """The regex, if `re` cannot take long over it on any path; None otherwise."""
    tree = _parsed(pattern)
    return _compiled(pattern) if steps(tree, limits.QUICK_PATTERN_STEPS) <= limits.QUICK_PATTERN_STEPS else None


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return _compiler.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise _wrong(pattern, error) from None


@functools.lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    if len(pattern) > limits.MAX_PATTERN_CHARS:
        raise ConfigError(f"a regex of {len(pattern):,} characters; at most {limits.MAX_PATTERN_CHARS:,} are read.")
    try:
        return _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise _wrong(pattern, error) from None


def _wrong(pattern: object, error: BaseException) -> ConfigError:
    return ConfigError(f"{str(pattern)[:200]!r}, which is no valid regex: {str(error) or 'nested too deeply'}.")


def steps(tree: Any, most: int, depth: int = 0) -> int:
    """At most so many ways can `re` go through a pattern on a long path; anything above `most` where they are too many.

    Each choice multiplies them. A repeat of a single character may end at any place; a repeat of more than that counts as
    too many, unless it is done once.
    """
    ways, more = 1, 0
    for op, value in tree:
        name = str(op)
        if name in REPEATS:
            low, high, body = value
            if int(high) == int(low) == 1 or (int(low) == 0 and int(high) == 1):
                ways *= (2 - int(low)) * steps(body, most, depth + 1)
            elif len(body) == 1 and str(body[0][0]) in ONE:
                ways *= min(int(high), TYPICAL) - min(int(low), TYPICAL) + 1
            else:
                return most + 1
        elif name == "BRANCH":
            ways *= sum(steps(branch, most, depth + 1) for branch in value[1])
        elif name == "SUBPATTERN":
            ways *= steps(value[-1], most, depth + 1)
        elif name in ("ASSERT", "ASSERT_NOT"):  # once it holds, it is not gone through again
            more += ways * steps(value[-1], most, depth + 1)
        elif name == "ATOMIC_GROUP":
            ways *= steps(value, most, depth + 1)
        elif name not in ONE and name != "GROUPREF":
            return most + 1
        if ways + more > most or depth > 100:
            return most + 1
    return ways + more


class _Positions:
    """One match by sets: for each part of a pattern and each position, the positions at which it can end."""

    def __init__(self, pattern: str, text: str) -> None:
        self.pattern, self.text, self.left = pattern, text, limits.MAX_PATTERN_STEPS
        self.tree = _parsed(pattern)
        self.known: dict[tuple[int, int, int], frozenset[int]] = {}
        self.parts: dict[tuple[int, int], re.Pattern[str]] = {}

    def ends(self) -> frozenset[int]:
        try:
            return self.sequence(self.tree, frozenset([0]), self.tree.state.flags)
        except RecursionError as error:
            raise _wrong(self.pattern, error) from None

    def sequence(self, tree: Any, at: frozenset[int], flags: int) -> frozenset[int]:
        for node in tree:
            at = frozenset().union(*(self.node(node, p, flags) for p in at))
            if not at:
                break
        return at

    def node(self, node: Any, at: int, flags: int) -> frozenset[int]:
        key = (id(node), at, flags)
        if key not in self.known:
            self.left -= 1
            _allowance.left -= 1
            if self.left < 0 or _allowance.left < 0:
                raise ConfigError(
                    f"{self.pattern[:200]!r}, a regex that takes more than {limits.MAX_PATTERN_STEPS:,} steps on paths "
                    f"such as {self.text[:100]!r}; write it with fewer repeats inside each other, or list the names."
                )
            self.known[key] = self.found(node, at, flags)
        return self.known[key]

    def found(self, node: Any, at: int, flags: int) -> frozenset[int]:
        name, value = str(node[0]), node[1]
        here = frozenset([at])
        if name in ONE:
            match = self.one(node, flags).match(self.text, at)
            return frozenset() if match is None else frozenset([match.end()])
        if name == "BRANCH":
            return frozenset().union(*(self.sequence(branch, here, flags) for branch in value[1]))
        if name == "SUBPATTERN":
            _, add, remove, body = value
            return self.sequence(body, here, (flags | add) & ~remove)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = value
            return self.repeat((int(low), int(high)), body, here, flags)
        if name in ("ASSERT", "ASSERT_NOT"):
            return here if self.holds(value, at, flags) == (name == "ASSERT") else frozenset()
        raise ConfigError(
            f"{self.pattern[:200]!r}, a regex with a part ({name.lower()}) that cannot be matched in bounded time beside "
            "its repeats; write it without."
        )

    def repeat(self, times: tuple[int, int], body: Any, at: frozenset[int], flags: int) -> frozenset[int]:
        low, high = times
        for _ in range(low):  # the set comes to rest, as positions only move on
            moved = self.sequence(body, at, flags)
            if moved == at:
                break
            at = moved
        found, front = at, at
        for _ in range(high - low):
            front = self.sequence(body, front, flags) - found
            if not front:
                break
            found |= front
        return found

    def holds(self, value: tuple[int, Any], at: int, flags: int) -> bool:
        """Whether a part matches that looks ahead (1) or back (-1)."""
        direction, body = value
        if direction > 0:
            return bool(self.sequence(body, frozenset([at]), flags))
        start = at - body.getwidth()[0]
        return start >= 0 and at in self.sequence(body, frozenset([start]), flags)

    def one(self, node: Any, flags: int) -> re.Pattern[str]:
        key = (id(node), flags)
        if key not in self.parts:
            self.parts[key] = _part(self.tree, node, flags)
        return self.parts[key]


def _part(tree: Any, node: Any, flags: int) -> re.Pattern[str]:
    state: Any = _parser.State()
    state.flags, state.str = flags, tree.state.str
    return _compiler.compile(_parser.SubPattern(state, [node]), flags)
