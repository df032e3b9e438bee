# SPDX-License-Identifier: Apache-2.0
"""AWQ (autoawq, gptqmodel): 4-bit integers in groups of inputs, of a weight that was scaled by its inputs' sizes."""

from __future__ import annotations

from .probed import Probed


class AWQ(Probed):
    """Any of the layers of both packages, whichever kernel runs them."""

    backend = "AWQ"
    why = "its scales were chosen from calibration data, and rounding anew without them would lose what that won"


AWQ_LAYERS = AWQ()
