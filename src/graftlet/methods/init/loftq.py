# SPDX-License-Identifier: Apache-2.0
"""LoftQ: quantisation and adapter together (arXiv 2310.08659).   Q_t = q(W - s B A),   U S V^T = W - Q_t,   A = sqrt(S / s) V^T

q rounds to few levels: normal-float ones (NF2, NF4; arXiv 2305.14314) in blocks of 64, or 255 even ones a row (8 bits). The
base keeps Q_t, and the adapter what was lost by it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.method import View
from ...errors import ConfigError
from ...weights.site import Embedding, Linear
from . import start
from .spectral import readable

BLOCK = 64
OFFSET = 0.9677083
"""How far into the tail of the normal law the outermost level lies."""


@dataclass(kw_only=True)
class LoftQConfig:
    """LoftQ. loftq_bits: how many bits a weight has, 2, 4 or 8. loftq_iter: how often quantisation and SVD take turns."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (2, 4, 8):
            raise ConfigError(f"LoftQConfig: loftq_bits={self.loftq_bits!r}; allowed: 2, 4, 8.")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ConfigError(f"LoftQConfig: loftq_iter={self.loftq_iter!r}; at least 1 is needed.")


@start("loftq", sites=(Linear, Embedding), rebases=True, bounded=True)
def loftq(p: View, A: Tensor, B: Tensor) -> Tensor:
    options = p.loftq_config if isinstance(p.loftq_config, LoftQConfig) else LoftQConfig()
    rounded, first, second = loftq_init(readable(p, "loftq"), options.loftq_bits, p.r, options.loftq_iter)
    A.copy_(first / p.scaling**0.5)
    B.copy_(second / p.scaling**0.5)
    return rounded


@torch.no_grad()
def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The weight `[out, in]` rounded to few levels, and A `[r, in]` and B `[out, r]` with `rounded + B A` near the weight.

    num_bits: 2, 4 or 8. num_iter: rounds.
    """
    LoftQConfig(loftq_bits=num_bits, loftq_iter=num_iter)
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rest, rounded, A, B = W, W, W, W
    for _ in range(num_iter):
        rounded = quantised(rest, num_bits)
        A, B = halves(W - rounded, reduced_rank)
        rest = W - B @ A
    return rounded.to(weight.dtype), A, B


def halves(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[r, in]` and B `[out, r]`, of the same strength, whose product is nearest to a matrix."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def quantised(W: Tensor, bits: int) -> Tensor:
    """A weight rounded to what so many bits can hold, in its own dtype."""
    if bits == 8:
        scale = W.abs().amax(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny) / 127
        return (W / scale).round() * scale
    flat = W.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    scale = scale.masked_fill(scale == 0, 1)
    steps = levels(bits).to(W)
    nearest = torch.bucketize(blocks / scale, (steps[1:] + steps[:-1]) / 2)
    return (steps[nearest] * scale).flatten()[: len(flat)].view(W.shape)


@functools.cache
def levels(bits: int) -> Tensor:
    """The levels of a normal float of so many bits, -1 to 1: quantiles of the normal law, one more above 0 than below."""
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, half, dtype=torch.float64)[:-1])
    found = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return found / found.max()
