# SPDX-License-Identifier: Apache-2.0
"""AQLM: groups of weights as sums of a few entries of learned codebooks."""

from __future__ import annotations

from .probed import Probed


class AQLM(Probed):
    """`aqlm.QuantizedLinear`."""

    backend = "AQLM"
    packed = ("codes",)
    why = "its codebooks were learned for this weight, and another one needs others"


AQLM_LAYERS = AQLM()
