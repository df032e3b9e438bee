# SPDX-License-Identifier: Apache-2.0
"""Where two adapter directories differ, read off their files: settings, and the layers' changes side by side.

Of low-rank layers the whole changes are compared, from their factors, so that two adapters which do the same by other
tensors come out alike: <B1 A1, B2 A2> = <B1^T B2, A1 A2^T>. Of all else, tensors of one name and shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .anatomy import Facts, read_anatomy, read_changes

Pair = tuple[Tensor, Tensor]
IDLE = ("peft_version", "inference_mode", "auto_mapping")


def compared(first: str | Path, second: str | Path) -> Facts:
    """Two adapters side by side.

    `settings`: `[first's, second's]` of each field that differs. `layers`: for each layer (or tensor) `norm_first`,
    `norm_second`; `distance`, the norm of the difference; `cosine`, 1 for the same direction, 0 for unrelated ones. None
    where one adapter has no such layer, or its shape differs.

    Raises `AdapterFileError` as `read_anatomy` does.
    """
    one, two = read_anatomy(first), read_anatomy(second)
    changes = read_changes(first), read_changes(second)
    names = list(dict.fromkeys([*changes[0], *changes[1]]))
    return {
        "first": str(first),
        "second": str(second),
        "settings": _settings(one["config"], two["config"]),
        "layers": [{"name": n, **_beside(changes[0].get(n), changes[1].get(n))} for n in names],
    }


def _settings(one: Facts, two: Facts) -> dict[str, list[Any]]:
    names = sorted({*one, *two} - set(IDLE))
    found = {n: [_sorted(one.get(n)), _sorted(two.get(n))] for n in names}
    return {n: values for n, values in found.items() if values[0] != values[1]}


def _sorted(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def _beside(one: Pair | None, two: Pair | None) -> Facts:
    norms = [None if p is None else _product(p, p) ** 0.5 for p in (one, two)]
    facts: Facts = {"norm_first": norms[0], "norm_second": norms[1], "distance": None, "cosine": None}
    if one is None or two is None or _size(one) != _size(two):
        return facts
    inner, (a, b) = _product(one, two), [n or 0.0 for n in norms]
    facts["distance"] = max(a**2 + b**2 - 2 * inner, 0.0) ** 0.5
    facts["cosine"] = inner / (a * b) if a and b else None
    return facts


def _product(one: Pair, two: Pair) -> float:
    """The inner product of two changes, of factors as `read_changes` gives them; never negative for a change itself."""
    (B1, A1), (B2, A2) = one, two
    value = float(torch.sum((B1.mT @ B2) * (A1 @ A2.mT)))
    return max(value, 0.0) if one is two else value


def _size(pair: Pair) -> tuple[int, int, int]:
    """`cells, out, columns`."""
    B, A = pair
    return len(A), B.shape[1], A.shape[2]
