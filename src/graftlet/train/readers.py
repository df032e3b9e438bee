# SPDX-License-Identifier: Apache-2.0
"""Readers of data files: each gives a list of rows, a row being a dictionary of columns. `@reader` adds a format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DependencyError, listing, nearest

Row = dict[str, Any]
Reader = Callable[[Path], list[Row]]
READERS: dict[str, Reader] = {}


def reader(*names: str) -> Callable[[Reader], Reader]:
    """Register the decorated function as the reader of these formats, which are also file suffixes."""

    def register(read: Reader) -> Reader:
        READERS.update(dict.fromkeys(names, read))
        return read

    return register


def read_file(path: Path, form: str = "auto") -> list[Row]:
    """The rows of a file; `ConfigError` where it is empty, malformed, or of a format without a reader."""
    name = path.suffix.lstrip(".").lower() if form == "auto" else form
    if name not in READERS:
        hint = nearest(name, READERS) or "."
        raise ConfigError(f"data.format: no reader for {name!r} ({path}){hint} Allowed: {listing(READERS, 20)}.")
    try:
        rows = READERS[name](path)
    except (ValueError, UnicodeDecodeError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as {name}: {error}.") from error
    if not rows:
        raise ConfigError(f"{path} holds no rows.")
    return rows


def read_hub(name: str, subset: str | None, split: str) -> list[Row]:
    """The rows of a dataset of the hub."""
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(name, subset, split=split)]
    except Exception as error:
        raise ConfigError(f"the dataset {name!r} (subset {subset}, split {split}) cannot be loaded: {error}") from error


@reader("jsonl", "ndjson")
def jsonl(path: Path) -> list[Row]:
    """One JSON object a line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: this line is no JSON: {error}.") from error
            if not isinstance(rows[-1], dict):
                raise ConfigError(f"{path}:{number}: a JSON object is needed, of one key a column.")
    return rows


@reader("json")
def json_list(path: Path) -> list[Row]:
    """One JSON list of objects."""
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ConfigError(f"{path}: a JSON list of objects is needed; for one object a line set data.format = 'jsonl'.")
    return rows


@reader("csv")
def csv_rows(path: Path) -> list[Row]:
    """Comma-separated, the first line naming the columns. Values stay text."""
    return _separated(path, ",")


@reader("tsv")
def tsv_rows(path: Path) -> list[Row]:
    """Tab-separated, the first line naming the columns. Values stay text."""
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {k: v or "" for k, v in row.items() if k is not None} for row in csv.DictReader(file, delimiter=delimiter)
        ]


@reader("parquet")
def parquet(path: Path) -> list[Row]:
    """A Parquet file."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DependencyError("reading Parquet needs pyarrow: pip install pyarrow") from None
    return pq.read_table(path).to_pylist()


@reader("chatterbot")
def chatterbot(path: Path) -> list[Row]:
    """The YAML of chatterbot-corpus: lists of a question and its answers. One row an answer: `prompt`, `completion`."""
    import yaml

    # the base loader keeps every scalar a text: an answer "Yes" is no boolean
    found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(found, dict) or not isinstance(found.get("conversations"), list):
        raise ConfigError(f"{path}: no chatterbot corpus; it has no list of conversations.")
    return [
        {"prompt": question, "completion": answer, "category": path.stem}
        for question, *answers in found["conversations"]
        for answer in answers
        if isinstance(question, str) and isinstance(answer, str)
    ]


@reader("bfcl")
def bfcl(path: Path) -> list[Row]:
    """Function calling as in the Berkeley leaderboard: `prompt`, `functions`, `completion` (JSON) and `gold`.

    The answers stand in a file of the same name in the folder `possible_answer`: by parameter the values allowed, ""
    for a parameter that may be left out. `completion` takes the first value of each and leaves those out.
    """
    answers = {row["id"]: row["ground_truth"] for row in jsonl(path.parent / "possible_answer" / path.name)}
    rows = []
    for row in jsonl(path):
        gold = answers.get(row["id"])
        if not gold:
            continue
        calls = [_first_call(g) for g in gold]
        rows.append(
            {
                "prompt": row["question"][0][-1]["content"],
                "functions": "\n".join(json.dumps(f, ensure_ascii=False) for f in row["function"]),
                "completion": json.dumps(calls[0] if len(calls) == 1 else calls),
                "gold": gold,
            }
        )
    return rows


def _first_call(call: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    (name, parameters), *_ = call.items()
    return {"name": name, "arguments": {k: _first(v[0]) for k, v in parameters.items() if "" not in v}}


def _first(value: Any) -> Any:
    """A nested gold value, whose leaves are lists of what is allowed, as the plain value it begins with."""
    if isinstance(value, dict):
        return {
            k: _first(v[0] if isinstance(v, list) else v)
            for k, v in value.items()
            if not (isinstance(v, list) and "" in v)
        }
    return value
