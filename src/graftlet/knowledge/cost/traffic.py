# SPDX-License-Identifier: Apache-2.0
"""What data-parallel workers send each other a step: the gradients of what learns, and nothing of what is frozen.

In a ring each of N workers sends 2 (N - 1) / N times the gradients (each part goes around once to be summed, once to be
told). Full fine-tuning sends the gradients of all parameters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that each of some workers sends a step, with the adapter alone learning, and with the whole model."""

    workers: int
    adapter: int
    full: int

    @property
    def less(self) -> float:
        """How many times less the adapter's step sends."""
        return self.full / self.adapter if self.adapter else float("inf")


def sent(gradients: int, parameters: int, itemsize: int, workers: int) -> Traffic:
    """gradients: bytes of the adapter's. parameters: how many the model has, each with a gradient of `itemsize` bytes."""
    share = 2 * (workers - 1) / workers
    return Traffic(workers, round(share * gradients), round(share * parameters * itemsize))
