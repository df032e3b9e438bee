# SPDX-License-Identifier: Apache-2.0
"""PiSSA: the principal singular directions (arXiv 2404.02948).   W ~ U S V^T,  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s)

The base keeps the rest, W - s B A. `pissa_niter_<k>` finds the directions by a randomised projection of k iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.method import View
from ...weights.site import Embedding, Linear
from . import start
from .spectral import readable, split_off

SITES = (Linear, Embedding)


@start("pissa", sites=SITES, rebases=True, bounded=True)
def pissa(p: View, A: Tensor, B: Tensor) -> Tensor:
    W = readable(p, "pissa")
    return split_off(p, A, B, W, *torch.linalg.svd(W, full_matrices=False))


@start("pissa_niter_<k>", sites=SITES, rebases=True, bounded=True)
def fast_pissa(p: View, A: Tensor, B: Tensor, k: int) -> Tensor:
    W = readable(p, f"pissa_niter_{k}")
    U, S, V = torch.svd_lowrank(W, p.r, niter=k)
    return split_off(p, A, B, W, U, S, V.T)
