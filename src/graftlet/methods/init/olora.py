# SPDX-License-Identifier: Apache-2.0
"""OLoRA: an orthonormal start (arXiv 2406.01775).   Q R = W,  B = Q_r,  A = R_r;  the base keeps W - s B A"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.method import View
from ...weights.site import Linear
from . import start
from .spectral import readable, without


@start("olora", sites=(Linear,), rebases=True, bounded=True)
def olora(p: View, A: Tensor, B: Tensor) -> Tensor:
    """The first r columns of Q, and the rows of R that go with them."""
    W = readable(p, "olora")
    Q, R = torch.linalg.qr(W)
    A.copy_(R[: p.r])
    B.copy_(Q[:, : p.r])
    return without(p, W, A, B)
