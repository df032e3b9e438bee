# SPDX-License-Identifier: Apache-2.0
"""How long a step takes at least: each operation as long as its products, or its bytes, take at the device's full rate.

A device is never that fast for a whole step. What whole steps reach of it is `REACHED`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .devices import Device
from .ledger import Work

REACHED = {"cuda": 0.67, "cpu": 0.67}
"""The share of the full rates that a whole step reaches: measured on CUDA, on a model of 8 billion parameters' shape."""


@dataclass(frozen=True)
class Time:
    """Seconds of a step. least: at the device's full rates. products: the part of it spent in products. likely: at the rates
    that are reached. flops: operations of all products.
    """

    least: float
    products: float
    likely: float
    flops: int


def roofline(work: Iterable[Work], device: Device, times: float = 1.0) -> Time:
    """The time of operations one after another, forwards and backwards `times` as often as they are here."""
    least = products = 0.0
    flops = 0
    for done in work:
        if done.phase == "start":
            continue
        often = 1.0 if done.phase == "optimiser" else times
        seconds = often * max(done.flops / device.rate(done.dtype), done.bytes / device.bandwidth)
        least += seconds
        products += seconds if done.flops else 0.0
        flops += round(often * done.flops)
    return Time(least, products, least / REACHED[device.kind], flops)


def by_operation(work: Iterable[Work], device: Device) -> Counter[str]:
    """Seconds at least, by operation: where a step's time goes."""
    found = Counter[str]()
    for done in work:
        if done.phase != "start":
            found[done.name] += max(done.flops / device.rate(done.dtype), done.bytes / device.bandwidth)  # pyright: ignore[reportArgumentType]
    return found
