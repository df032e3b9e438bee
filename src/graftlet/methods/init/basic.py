# SPDX-License-Identifier: Apache-2.0
"""The ordinary starts of a low-rank pair: one factor random and the other zero (arXiv 2106.09685), or both random."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.init import kaiming_uniform_

from ...core.method import View
from ...weights.site import Embedding
from . import start


@start("True")
def zero_start(p: View, A: Tensor, B: Tensor) -> None:
    """One factor random, the other zero: the layer starts unchanged."""
    if isinstance(p.site, Embedding):
        A.zero_()
        B.normal_()
    else:
        kaiming_uniform_(A, a=math.sqrt(5))
        B.zero_()


@start("False")
def random_start(p: View, A: Tensor, B: Tensor) -> None:
    """Both factors random, so that the adapter acts from the start: for tests."""
    if isinstance(p.site, Embedding):
        A.normal_()
        B.normal_()
        return
    kaiming_uniform_(A, a=math.sqrt(5))
    kaiming_uniform_(B, a=math.sqrt(5))
    if p.lora_bias:
        bound = 1 / math.sqrt(p.r)
        p.lora_B_bias.uniform_(-bound, bound)


@start("gaussian")
def gaussian(p: View, A: Tensor, B: Tensor) -> None:
    """A from N(0, 1/r), B zero."""
    if isinstance(p.site, Embedding):
        A.zero_()
        B.normal_(std=1 / p.r)
    else:
        A.normal_(std=1 / p.r)
        B.zero_()
