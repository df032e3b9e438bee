# SPDX-License-Identifier: Apache-2.0
"""MiCA: learn in the minor directions (arXiv 2604.01694).   W = U S V^T,  B = the last r columns of U, frozen,  A = 0"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.method import View
from ...weights.site import Embedding, Linear
from . import start
from .spectral import readable


@start("mica", sites=(Linear, Embedding), frozen="B", bounded=True)
def mica(p: View, A: Tensor, B: Tensor) -> None:
    """Only A learns: what the adapter adds stays in the weight's least used output directions."""
    U, _, _ = torch.linalg.svd(readable(p, "mica"), full_matrices=False)
    A.zero_()
    B.copy_(U[:, -p.r :])
