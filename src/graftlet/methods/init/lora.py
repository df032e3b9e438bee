# SPDX-License-Identifier: Apache-2.0
"""Starts of a low-rank pair: functions of (view, A, B) that fill A and B, and may return a new base weight.

PiSSA (arXiv 2404.02948): W ~ U S V^T, A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s), base W - s B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...core.method import View
from ...errors import ConfigError, nearest
from ...weights.site import Embedding, Linear

Start = Callable[[View, Tensor, Tensor], "Tensor | None"]


def initialiser(choice: bool | str) -> Start:
    """The start that `init_lora_weights` names. Raises `ConfigError` for what is none."""
    if isinstance(choice, bool):
        return zero_start if choice else random_start
    name = choice.lower()
    if name in _NAMED:
        return _NAMED[name]
    if found := re.fullmatch(r"pissa_niter_(\d+)", name):
        return partial(pissa, iterations=int(found[1]))
    allowed = [*_NAMED, "pissa_niter_<k>"]
    raise ConfigError(
        f"init_lora_weights={choice!r}{nearest(name, allowed)} Allowed: True, False, {', '.join(map(repr, allowed))}."
    )


def zero_start(p: View, A: Tensor, B: Tensor) -> None:
    """One factor random, the other zero: the layer starts unchanged."""
    if isinstance(p.site, Embedding):
        A.zero_()
        B.normal_()
    else:
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B.zero_()
    _zero_bias(p)


def random_start(p: View, A: Tensor, B: Tensor) -> None:
    """Both factors random, so that the adapter acts from the start: for tests."""
    if isinstance(p.site, Embedding):
        A.normal_()
        B.normal_()
        return
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    torch.nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    if p.lora_bias:
        bound = 1 / math.sqrt(p.r)
        p.lora_B_bias.uniform_(-bound, bound)


def gaussian(p: View, A: Tensor, B: Tensor) -> None:
    """A from N(0, 1/r), B zero."""
    if isinstance(p.site, Embedding):
        A.zero_()
        B.normal_(std=1 / p.r)
    else:
        A.normal_(std=1 / p.r)
        B.zero_()
    _zero_bias(p)


def pissa(p: View, A: Tensor, B: Tensor, iterations: int | None = None) -> Tensor:
    """The principal singular directions of W, exact or (with `iterations`) by a randomised projection."""
    if not isinstance(p.site, (Linear, Embedding)):
        raise ConfigError(f"init_lora_weights='pissa' works on Linear, Conv1D and Embedding, not on {p.key!r}.")
    W, _ = p.site.read()
    if not W.is_floating_point() or W.dtype.itemsize < 2:
        raise ConfigError(
            f"init_lora_weights='pissa' needs a weight in float32, float16 or bfloat16; {p.key!r} is {W.dtype}."
        )
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if iterations is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, p.r, niter=iterations)
        Vh = V.T
    root = (S[: p.r] / p.scaling).sqrt()
    A.copy_(root[:, None] * Vh[: p.r])
    B.copy_(U[:, : p.r] * root)
    _zero_bias(p)
    return W - p.scaling * (B.to(W.dtype) @ A.to(W.dtype))


def _zero_bias(p: View) -> None:
    if p.lora_bias:
        p.lora_B_bias.zero_()


_NAMED: dict[str, Start] = {"gaussian": gaussian, "pissa": pissa}
