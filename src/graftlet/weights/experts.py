# SPDX-License-Identifier: Apache-2.0
"""Stacks of experts that are kept and multiplied in 8 or 4 bits: their kernel takes them as they are, and no other weight."""

from __future__ import annotations

from torch import nn

from .storage import Storage


class Experts(Storage):
    """config: what loads the model with ordinary experts."""

    def __init__(self, backend: str, config: str) -> None:
        self.backend = backend  # type: ignore[misc]
        self.config = config

    def unusable(self, module: nn.Module) -> str | None:
        return (
            f"its experts are kept as {self.backend}, and its kernel takes no others; load the model with "
            f"{self.config}(dequantize=True) to adapt them, or adapt its other layers as it is"
        )


MXFP4 = Experts("MXFP4", "Mxfp4Config")
FP8 = Experts("FP8", "FineGrainedFP8Config")
FBGEMM = Experts("FP8", "FbgemmFp8Config")
