# SPDX-License-Identifier: Apache-2.0
"""Principal directions of rows that come in batches, in memory that does not grow (Ross et al., IJCV 2008).

Of n rows so far: mean m, singular values S, directions V. A batch X of b rows with mean m_b gives the next by the SVD of
`[S V; X - m_b; sqrt(n b / (n + b)) (m - m_b)]`, cut to the first k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

Triple = tuple[Tensor, Tensor, Tensor]


class Directions:
    """The first `k` principal directions of all rows seen so far.

    Rows are held back until there are k of them. `settled` says that the last batch turned no direction by more than
    the angle whose cosine is `tau`.
    """

    def __init__(self, k: int, tau: float) -> None:
        self.k, self.tau = k, tau
        self.count = 0
        self.settled = False
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take rows `[b, features]` in."""
        self._waiting.append(rows.double())
        if sum(len(w) for w in self._waiting) < self.k:
            return
        X = torch.cat(self._waiting)
        self._waiting = []
        before = self.V if self.count else None
        self._update(X)
        if before is not None:
            self.settled = bool((cosine_similarity(before, self.V, dim=1).abs() >= self.tau).all())

    def _update(self, X: Tensor) -> None:
        b, batch_mean = len(X), X.mean(0)
        spread = ((X - batch_mean) ** 2).sum(0)
        stacked = X - batch_mean
        if not self.count:
            self.mean, self.spread = batch_mean, spread
        else:
            weight = self.count * b / (self.count + b)
            drift = self.mean - batch_mean
            stacked = torch.cat([self.S[:, None] * self.V, stacked, weight**0.5 * drift[None]])
            self.spread = self.spread + spread + weight * drift**2
            self.mean = (self.count * self.mean + b * batch_mean) / (self.count + b)
        self.count += b
        _, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
        self.S, self.V = S[: self.k], _signed(Vh[: self.k])

    @property
    def found(self) -> Triple:
        """The directions `[k, features]`, their singular values, and the share of the rows' variance that each explains."""
        return self.V, self.S, self.S**2 / self.spread.sum()


def _signed(V: Tensor) -> Tensor:
    """Each direction with its largest entry positive, so that the same rows give the same directions."""
    largest = V.gather(1, V.abs().argmax(1, keepdim=True))
    return V * largest.sign()
