# SPDX-License-Identifier: Apache-2.0
"""The quantised layers that tests run on: every back end whose package is here and works on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Backend:
    """One way to quantise a linear layer.

    make: the layer, quantised; the given one is left alone. call: how far its output may be from the product with what is
    read, relative to the largest output. rounding: how much of a normally distributed weight its rounding loses at most,
    as a share of the norm.
    """

    name: str
    needs: str
    make: Callable[[nn.Linear], nn.Module]
    call: float
    rounding: float

    def __str__(self) -> str:
        return self.name


def four_bit(
    quant_type: str, nested: bool, words: torch.dtype = torch.uint8, dtype: torch.dtype = torch.float32
) -> Any:
    """A `Linear4bit` of a layer."""

    def make(plain: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type=quant_type,
            quant_storage=words,
        )
        made.load_state_dict(plain.state_dict())
        return made.to(dtype).to("cpu")

    return make


BACKENDS = [
    b
    for b in [
        Backend("nf4", "bitsandbytes", four_bit("nf4", False), 1e-5, 0.11),
        Backend("nf4-double", "bitsandbytes", four_bit("nf4", True), 1e-5, 0.11),
        Backend("nf4-words", "bitsandbytes", four_bit("nf4", True, torch.bfloat16), 1e-5, 0.11),
        Backend("nf4-brain", "bitsandbytes", four_bit("nf4", True, dtype=torch.bfloat16), 2e-2, 0.11),
        Backend("fp4", "bitsandbytes", four_bit("fp4", True), 1e-5, 0.15),
    ]
    if importlib.util.find_spec(b.needs)
]
