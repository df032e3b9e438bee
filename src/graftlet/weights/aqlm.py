# SPDX-License-Identifier: Apache-2.0
"""AQLM: groups of weights as sums of a few entries of learned codebooks."""

from __future__ import annotations

from torch import Tensor, nn

from .probed import Probed


class AQLM(Probed):
    """`aqlm.QuantizedLinear`.

    On a CPU its kernel lets several threads add to one number without waiting for each other, so that some of what they
    add may be lost. It is read by one thread.
    """

    backend = "AQLM"
    packed = ("codes",)
    why = "its codebooks were learned for this weight, and another one needs others"

    def read(self, module: nn.Module, name: str) -> Tensor:
        if self.tensor(module, name).device.type != "cpu":
            return super().read(module, name)
        import numba  # pyright: ignore[reportMissingImports]

        before = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            return super().read(module, name)
        finally:
            numba.set_num_threads(before)


AQLM_LAYERS = AQLM()
