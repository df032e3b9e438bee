# SPDX-License-Identifier: Apache-2.0
"""What starts from singular directions share: reading the weight, and moving a part of it into the pair.

W' = W - s B A, so that base and adapter together begin as W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.method import View
from ...errors import ConfigError


def readable(p: View, name: str) -> Tensor:
    """The base weight in at least single precision. Raises `ConfigError` where it is kept quantised."""
    W, _ = p.site.read()
    if not W.is_floating_point() or W.dtype.itemsize < 2:
        raise ConfigError(
            f"init_lora_weights={name!r} needs a weight in float32, float16 or bfloat16; {p.key!r} is {W.dtype}."
        )
    return W.to(torch.promote_types(W.dtype, torch.float32))


def without(p: View, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The weight less what the pair stands for, as the pair is kept."""
    return W - p.scaling * (B.to(W.dtype) @ A.to(W.dtype))


def split_off(p: View, A: Tensor, B: Tensor, W: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Fill the pair with the first r of these directions, each half of the strength; the weight that is left."""
    root = (S[: p.r] / p.scaling).sqrt()
    A.copy_(root[:, None] * Vh[: p.r])
    B.copy_(U[:, : p.r] * root)
    return without(p, W, A, B)
