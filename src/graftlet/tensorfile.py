# SPDX-License-Identifier: Apache-2.0
"""safetensors files, checked before anything is read: a header that lies is refused, whatever it lies about.

Needs the standard library alone. A file is eight bytes of the header's length, a JSON header, and the tensors' bytes,
without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from . import limits
from .errors import AdapterFileError, listing

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
"""The bytes of one number, by the name of its kind."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `end` count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says it holds. offset: where its tensors begin."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    offset: int

    @property
    def elements(self) -> int:
        return sum(entry.elements for entry in self.entries.values())


def read_header(path: Path) -> Header:
    """The header of a safetensors file. `AdapterFileError` names the file, and what is wrong with it."""
    try:
        with path.open("rb") as file:
            return header_in(file, path)
    except OSError as error:
        _refuse(path, str(error))


def header_in(file: BinaryIO, path: Path) -> Header:
    """The header of an open file, which stands after it from then on."""
    size = os.fstat(file.fileno()).st_size
    return parse_header(file.read(8), size, file.read, path)


def parse_header(first: bytes, size: int, read: Any, path: Path) -> Header:
    """A header out of its first eight bytes, the file's size, and a function that reads on."""
    if len(first) < 8:
        _refuse(path, f"it has {len(first)} bytes, too few for a header.")
    length = int.from_bytes(first, "little")
    if length > size - 8:
        _refuse(path, f"its header should take {length:,} bytes, but the file ends after {size - 8:,}.")
    if length > limits.MAX_HEADER_BYTES:
        _refuse(path, f"its header takes {length:,} bytes; at most {limits.MAX_HEADER_BYTES:,} are read.")
    values = _json(read(length), path)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "its metadata are no strings by name.")
    entries = {key: _entry(key, value, path) for key, value in values.items()}
    _check_places(entries, size - 8 - length, path)
    return Header(path, entries, metadata, 8 + length)


def _json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is no JSON: {str(error) or 'nested too deeply'}.")
    if not isinstance(values, dict):
        _refuse(path, f"its header is a JSON {type(values).__name__}; an object is needed.")
    return values


def deeper(value: object, limit: int) -> bool:
    """Whether lists and objects stand in each other more than `limit` levels deep; found out without a recursion."""
    level = [value]
    for _ in range(limit + 1):
        held = [v for v in level if isinstance(v, (list, dict))]
        level = [inner for v in held for inner in (v.values() if isinstance(v, dict) else v)]
    return bool(level)


def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once. Raises `ValueError` otherwise: readers would differ in what they take."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:200]!r} is there twice")
        found[key] = value
    return found


def _entry(key: str, value: Any, path: Path) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"its header says of {key[:200]!r} something else than dtype, shape and data_offsets.")
    if len(key) > limits.MAX_KEY_CHARS:
        _refuse(
            path, f"{key[:100]!r}... is a name of {len(key):,} characters; at most {limits.MAX_KEY_CHARS:,} are read."
        )
    dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in SIZES if isinstance(dtype, str) else True:
        _refuse(path, f"{key[:200]!r} is of the kind {str(dtype)[:40]!r}; known: {listing(sorted(SIZES), 20)}.")
    if not _naturals(shape) or len(shape) > limits.MAX_DIMENSIONS:
        _refuse(path, f"{key[:200]!r} has the shape {str(shape)[:100]}.")
    if not _naturals(places) or len(places) != 2 or places[0] > places[1]:
        _refuse(path, f"{key[:200]!r} has the data_offsets {str(places)[:100]}.")
    entry = Entry(dtype, tuple(shape), *places)
    if entry.elements * SIZES[dtype] != entry.end - entry.start:
        needed = entry.elements * SIZES[dtype]
        _refuse(path, f"{key[:200]!r} of shape {shape} takes {needed:,} bytes, not {entry.end - entry.start:,}.")
    return entry


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_places(entries: dict[str, Entry], size: int, path: Path) -> None:
    """Every byte belongs to one tensor."""
    end = 0
    for key, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.start != end:
            _refuse(path, f"{key[:200]!r} begins at byte {entry.start:,}, but what is before it ends at {end:,}.")
        end = entry.end
    if end != size:
        _refuse(path, f"its tensors take {end:,} bytes, but it holds {size:,}; it was cut off or added to.")


def first_unfinite(file: BinaryIO, header: Header) -> str | None:
    """The key of a tensor that holds NaN or Inf; None where there is none."""
    for key, entry in header.entries.items():
        file.seek(header.offset + entry.start)
        left = entry.end - entry.start
        while left:
            block = file.read(min(left, 2**24))
            if not block:
                _refuse(header.path, "it became shorter while it was read.")
            if _unfinite(block, entry.dtype):
                return key
            left -= len(block)
    return None


_TOP = {"F16": bytes([*range(0x7C, 0x80), *range(0xFC, 0x100)]), **dict.fromkeys(("BF16", "F32", "F64"), b"\x7f\xff")}
"""The highest bytes that numbers with all bits of the exponent set can have."""
_NEXT = {"F16": 0, "BF16": 0x80, "F32": 0x80, "F64": 0xF0}
"""The least that the byte below it is then."""


def _unfinite(block: bytes, dtype: str) -> bool:
    if dtype not in _TOP:
        return False
    size = SIZES[dtype]
    high, low, table = block[size - 1 :: size], block[size - 2 :: size], _TOP[dtype]
    if len(high.translate(None, table)) == len(high):
        return False
    return any(h in table and below >= _NEXT[dtype] for h, below in zip(high, low, strict=False))


def _refuse(path: Path, why: str) -> NoReturn:
    raise AdapterFileError(f"{path} cannot be read: {why} It is damaged or not an adapter file.")
