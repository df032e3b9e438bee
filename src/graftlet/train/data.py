# SPDX-License-Identifier: Apache-2.0
"""From rows to examples: filtered, put into words, freed of doubles, balanced, and split into disjoint parts."""

from __future__ import annotations

import random
import string
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, listing, nearest
from .readers import Row, read_file, read_hub
from .recipe import DataTable, Filter
from .sources import data_files

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Example:
    """One conversation that ends with an answer; `gold` is what a metric compares with where that is no text.

    rejected: an answer that is worse, where the data has preferences.
    """

    messages: tuple[Message, ...]
    gold: Any = None
    group: str = ""
    rejected: str | None = None

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]

    @property
    def key(self) -> str:
        """What makes two examples the same question: all but the last answer, whatever the case and spacing."""
        return " ".join("\n".join(m["content"] for m in self.messages[:-1]).casefold().split())


@dataclass
class Splits:
    """What is trained on and what is held out. No question stands in two of them, nor twice in one, if deduplicated."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    facts: dict[str, Any] = field(default_factory=dict)
    """Rows read, filtered away, doubles left out."""


def load_splits(table: DataTable, seed: int, folder: Path = Path()) -> Splits:
    """The examples of `[data]`, the same ones for the same seed."""
    facts = {"rows": 0, "filtered": 0, "doubles": 0}
    own = {name: _examples(getattr(table, f"{name}_source"), table, folder, facts) for name in ("test", "validation")}
    pool = _examples(table.source, table, folder, facts)
    seen: set[str] = set()
    parts = {name: _unique(found, seen, facts) if table.dedupe else found for name, found in own.items()}
    pool = _unique(pool, seen, facts) if table.dedupe else pool
    if table.shuffle:
        random.Random(seed).shuffle(pool)
    sizes = {"test": table.test, "validation": table.validation}
    for name, size in sizes.items():
        given = parts[name] if own[name] else None
        total = _room(given or pool, bool(table.balance))
        count = total if given and not size else _count(size, total)
        parts[name], rest = _take(given if given is not None else pool, count, bool(table.balance), name)
        pool = pool if given is not None else rest
    wanted = _count(table.train, _room(pool, bool(table.balance))) if table.train is not None else None
    train, _ = _take(pool, wanted, bool(table.balance), "train")
    if not train:
        raise ConfigError(f"data: no examples are left to train on, of {facts['rows']} rows read ({_told(facts)}).")
    return Splits(train, parts["validation"], parts["test"], facts)


def _told(facts: dict[str, Any]) -> str:
    return f"{facts['filtered']} filtered out, {facts['doubles']} doubles"


def _room(pool: list[Example], balanced: bool) -> int:
    groups = Counter(e.group for e in pool)
    return len(groups) * min(groups.values(), default=0) if balanced else len(pool)


def _count(size: float | int, total: int) -> int:
    return size if isinstance(size, int) else round(size * total)


def _examples(source: str | list[str] | None, table: DataTable, folder: Path, facts: dict[str, Any]) -> list[Example]:
    if source is None:
        return []
    rows = [row for name in ([source] if isinstance(source, str) else source) for row in _rows(name, table, folder)]
    facts["rows"] += len(rows)
    for column, words in table.values.items():
        _require(rows[0], column, "data.values")
        rows = [{**row, column: words.get(str(row[column]), row[column])} for row in rows]
    kept = [row for row in rows if all(_passes(row, f) for f in table.where)]
    facts["filtered"] += len(rows) - len(kept)
    return [_example(row, table) for row in kept]


def _rows(name: str, table: DataTable, folder: Path) -> list[Row]:
    paths = [] if table.format == "hub" else data_files(name, folder)
    if not paths:
        return read_hub(name, table.subset, table.split)
    return [row for path in paths for row in read_file(path, table.format)]


def _require(row: Row, column: str, place: str) -> Any:
    if column not in row:
        raise ConfigError(
            f"{place}: the data has no column {column!r}{nearest(column, row) or '.'} It has: {listing(row, 20)}."
        )
    return row[column]


def _passes(row: Row, rule: Filter) -> bool:
    value = _require(row, rule.column, "data.where")
    text = str(value)
    return (
        (rule.equals is None or text == str(rule.equals))
        and (rule.one_of is None or text in map(str, rule.one_of))
        and (rule.contains is None or rule.contains in text)
        and (rule.min_chars is None or len(text) >= rule.min_chars)
        and (rule.max_chars is None or len(text) <= rule.max_chars)
    )


def _example(row: Row, table: DataTable) -> Example:
    group = str(_require(row, table.balance, "data.balance")) if table.balance else ""
    if table.label is not None:
        return Example(tuple(_labelled(row, table)), group=group)
    given = row.get("messages") if table.messages is None and table.prompt is None else None
    if table.messages or given is not None:
        messages = _messages(_require(row, table.messages or "messages", "data.messages"))
    else:
        messages = [
            {"role": "user", "content": fill(table.prompt or "{prompt}", row, "data.prompt")},
            {"role": "assistant", "content": fill(table.completion or "{completion}", row, "data.completion")},
        ]
    messages = _introduced(messages, row, table)
    rejected = None if table.rejected is None else fill(table.rejected, row, "data.rejected")
    return Example(tuple(messages), row.get("gold"), group, rejected)


def _introduced(messages: list[Message], row: Row, table: DataTable) -> list[Message]:
    """A conversation with the recipe's system prompt before it, unless it has its own."""
    if table.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": fill(table.system, row, "data.system")}, *messages]


def _labelled(row: Row, table: DataTable) -> list[Message]:
    """A text, and its label in the place of an answer."""
    label = str(_require(row, table.label or "", "data.label"))
    asked = [{"role": "user", "content": fill(table.prompt or "{prompt}", row, "data.prompt")}]
    return [*_introduced(asked, row, table), {"role": "assistant", "content": label}]


def _messages(given: Any) -> list[Message]:
    """A conversation up to its last answer; `ConfigError` where it is none or has no answer."""
    right = isinstance(given, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in given)
    if not right:
        raise ConfigError(f"data.messages: a list of {{role, content}} is needed, not {str(given)[:80]!r}.")
    for message in given:
        if message["role"] not in ROLES:
            role = message["role"]
            hint = nearest(str(role), ROLES) or "."
            raise ConfigError(f"data.messages: role {role!r}{hint} Allowed: {listing(ROLES)}.")
    last = max((i for i, m in enumerate(given) if m["role"] == "assistant"), default=0)
    if last == 0:
        raise ConfigError(f"data.messages: no assistant answer follows a question in {str(given)[:80]!r}.")
    return [{"role": m["role"], "content": m["content"] or ""} for m in given[: last + 1]]


def fill(template: str, row: Row, place: str) -> str:
    """A template with a row's columns put in for `{column}`; `{{` and `}}` are braces."""
    words = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{place}: {template!r} is no template: {error}; write a brace as {{{{ or }}}}.") from error
    for text, column, _, _ in pieces:
        words.append(text)
        if column is not None:
            words.append(str(_require(row, column, place)))
    return "".join(words)


def _unique(examples: Iterable[Example], seen: set[str], facts: dict[str, Any]) -> list[Example]:
    kept = []
    for example in examples:
        if example.key in seen:
            facts["doubles"] += 1
        else:
            seen.add(example.key)
            kept.append(example)
    return kept


def _take(pool: list[Example], count: int | None, balanced: bool, name: str) -> tuple[list[Example], list[Example]]:
    """The first `count` examples (all where None), as many of each group if balanced, and those that are left."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in pool:
        groups[example.group if balanced else ""].append(example)
    each = min(map(len, groups.values()), default=0) if count is None else -(-count // max(len(groups), 1))
    for group, members in groups.items():
        if len(members) < each:
            of = f" with {group!r}" if balanced else ""
            raise ConfigError(f"data.{name} = {count}: {each} examples{of} are needed, and {len(members)} are there.")
    chosen = {id(e) for members in groups.values() for e in members[:each]}
    taken = [e for e in pool if id(e) in chosen][:count]
    kept = {id(e) for e in taken}
    return taken, [e for e in pool if id(e) not in kept]
