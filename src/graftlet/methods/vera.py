# SPDX-License-Identifier: Apache-2.0
"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454).   dW = diag(b) B diag(d) A

A `[r, in]` and B `[out, r]` are random, frozen and shared by all layers: each layer uses the first rows and columns of
one pair as large as the largest layer. A layer's own are d `[r]` and b `[out]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..registry import method
from ..weights.site import Attention, Conv, Conv1D, Embedding, Linear, Parameter
from .parts.shared_pair import SharedPair, SharedPairConfig


@dataclass(kw_only=True)
class VeraConfig(SharedPairConfig):
    """VeRA.

    Args:
        r: the rank of the shared pair. d_initial: what d starts at.
        projection_prng_key: the seed of the shared pair. save_projection: write the pair into the file too, so that it
            does not depend on the random generator that reads it.
        vera_dropout: dropout on the adapter's input.
        init_weights: True (zero b: no change at first) or False (random). bias: "none", "all", or "vera_only".
    """

    vera_dropout: float = 0.0


@method("vera", VeraConfig, sites=(Linear, Conv1D, Conv, Embedding, Attention, Parameter), prefix="vera_lambda_")
class VeRA(SharedPair):
    name, dropout = "vera", "vera_dropout"
