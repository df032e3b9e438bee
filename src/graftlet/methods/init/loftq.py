# SPDX-License-Identifier: Apache-2.0
"""LoftQ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class LoftQConfig:
    """LoftQ. loftq_bits: how many bits a weight has. loftq_iter: how often quantisation and SVD take turns."""

    loftq_bits: int = 4
    loftq_iter: int = 1
