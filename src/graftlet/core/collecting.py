# SPDX-License-Identifier: Apache-2.0
"""Python's collector, which looks through all there is each time that some hundred things were made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A block that makes thousands of things, none of them garbage: the collector waits until it ends, if it is on at all."""
    waits = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if waits:
            gc.enable()
