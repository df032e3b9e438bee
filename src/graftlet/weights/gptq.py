# SPDX-License-Identifier: Apache-2.0
"""GPTQ (gptqmodel, auto-gptq): integers of 2 to 8 bits in groups of inputs, each with a scale and an integer zero."""

from __future__ import annotations

from .probed import Probed


class GPTQ(Probed):
    """Any of the layers of both packages, whichever kernel runs them."""

    backend = "GPTQ"
    why = "its integers were chosen from calibration data, and rounding anew without them would lose what that won"


GPTQ_LAYERS = GPTQ()
