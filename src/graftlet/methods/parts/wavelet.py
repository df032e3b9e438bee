# SPDX-License-Identifier: Apache-2.0
"""One level of the wavelet transform, on the last dimension, for the orthogonal families in `wavelets.json`.

That file holds each family's low-pass taps; the high-pass ones are the same backwards with every second sign turned.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FAMILIES: dict[str, list[float]] = json.loads(Path(__file__).parents[1].joinpath("wavelets.json").read_text())
"""Low-pass synthesis taps by family."""


def filters(family: str, like: Tensor) -> Tensor:
    """The low-pass and the high-pass filter, `[2, 1, taps]`."""
    low = FAMILIES[family]
    high = [-tap if k % 2 else tap for k, tap in enumerate(reversed(low))]
    return torch.tensor([[low], [high]], dtype=like.dtype, device=like.device)


def synthesis(c: Tensor, family: str, size: int) -> Tensor:
    """Signals of `size` entries from their bands: the low-pass coefficients, then as many high-pass ones."""
    bank = filters(family, c)
    start = bank.shape[-1] - 2
    y = F.conv_transpose1d(c.reshape(-1, 2, c.shape[-1] // 2), bank, stride=2)
    return y[:, 0, start : start + size].reshape(*c.shape[:-1], size)


def analysis(x: Tensor, family: str) -> Tensor:
    """The transpose of `synthesis`."""
    bank, size = filters(family, x), x.shape[-1]
    half, _ = bands(size, family)
    rows = F.pad(x.reshape(-1, 1, size), (bank.shape[-1] - 2, 2 * half - size))
    return F.conv1d(rows, bank, stride=2).reshape(*x.shape[:-1], 2 * half)


def bands(size: int, family: str) -> tuple[int, int]:
    """The length of each band of a signal's, and how many coefficients stand before a row of `size` put in their middle."""
    half = (size + len(FAMILIES[family]) - 1) // 2
    return half, (2 * half - size) // 2


def places_in_bands(places: Tensor, height: int, width: int, family: str) -> Tensor:
    """Rows and columns `[2, n]` among the bands, for places in a matrix put in the middle of them.

    The format means the upper right quarter as low-pass over the columns and high-pass over the rows, and the lower left
    one as the opposite: which band a row falls in decides about the column's, and the other way round.
    """
    (tall, above), (wide, before) = bands(height, family), bands(width, family)
    row, column = places // width + above, places % width + before
    return torch.stack([row % tall + tall * (column >= wide), column % wide + wide * (row >= tall)], -2)
