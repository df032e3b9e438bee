# SPDX-License-Identifier: Apache-2.0
"""EETQ: 8-bit integers with a scale an output, in an order that only its GPU kernel knows."""

from __future__ import annotations

import torch
from torch import nn

from .probed import Probed


class EETQ(Probed):
    """transformers' and the package's own layer: weight `[in, out]` int8, `weight_scales` `[out]` float16."""

    backend = "EETQ"
    packed = ("weight", "qweight")
    scales = ("weight_scales", "scales", "weight_scale")
    why = "its integers stand in an order that only its kernel can make"

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size(reversed(self.tensor(module, name).shape))


EETQ_LAYERS = EETQ()
