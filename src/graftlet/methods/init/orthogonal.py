# SPDX-License-Identifier: Apache-2.0
"""Orthogonal start: both factors random, their product zero.   Q orthogonal [r, r]:  A = Q_odd^T R1 / 10,  B = R2 Q_even / 10

Rows of A lie in the span of one half of Q's rows, columns of B in that of the other, so B A = 0 although neither is: both
factors get gradients from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.method import View
from ...errors import ConfigError
from ...weights.site import Linear
from . import start


def even(config: object, ranks: dict[str, int]) -> None:
    """Raise `ConfigError` where a rank cannot be halved."""
    for name, rank in ranks.items():
        if rank % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank; {name}={rank} was given.")


@start("orthogonal", sites=(Linear,), checks=even)
def orthogonal(p: View, A: Tensor, B: Tensor) -> None:
    """Random factors whose product is zero to rounding."""
    wide = torch.float32 if A.dtype.itemsize < 4 else A.dtype
    made = {"dtype": wide, "device": A.device}
    Q, _ = torch.linalg.qr(torch.randn(p.r, p.r, **made))
    A.copy_((torch.randn(A.shape[1], p.r // 2, **made) @ Q[0::2]).T / 10)
    B.copy_(torch.randn(p.r // 2, B.shape[0], **made).T @ Q[1::2] / 10)
