# SPDX-License-Identifier: Apache-2.0
"""Devices: how much they hold and how fast they are, from a table of data sheets (`devices.json`) or measured.

Rates there are dense TFLOP/s, bandwidth is GB/s, memory GB as sold; here they are numbers a second, and bytes.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import ConfigError, listing, nearest
from ...machine import main_memory

CONTEXT = {"cuda": 600 * 2**20}
"""What a process takes on a device beside torch's tensors: the driver's context and the libraries' code."""
SCRATCH = {"cuda": 64 * 2**20}
"""cuBLAS keeps 32 MiB for each of the two threads that call it (forward and backward), of torch's own memory."""


@dataclass(frozen=True)
class Device:
    """A device. half, single: floating-point operations a second in 16 and 32 bits; bandwidth: bytes a second; memory: bytes.

    here: it is on this machine. source: where the figures are from.
    """

    name: str
    kind: str
    half: float
    single: float
    bandwidth: float
    memory: int
    source: str
    here: bool = False

    @property
    def room(self) -> int:
        """What there is for tensors."""
        return self.memory - CONTEXT.get(self.kind, 0)

    def rate(self, dtype: torch.dtype | None) -> float:
        """Operations a second of products in a dtype."""
        return self.half if dtype in (torch.bfloat16, torch.float16) else self.single


@functools.cache
def table() -> dict[str, Device]:
    """The devices that are known by name."""
    rows = json.loads(Path(__file__).with_name("devices.json").read_text())
    return {
        name: Device(
            name,
            row["kind"],
            row["bf16"] * 1e12,
            row["fp32"] * 1e12,
            row["bandwidth"] * 1e9,
            int(row["memory"] * 1e9),
            row["source"],
        )
        for name, row in rows.items()
    }


def find_device(name: str | torch.device | Device | None = None) -> Device:
    """A device by its name in the table or a part of it ("H100"), one of this machine's ("cuda", "cpu"), or the best here.

    Raises `ConfigError` for what is neither.
    """
    if isinstance(name, Device):
        return name
    text = str(name or "auto")
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return _cpu()
    if text.partition(":")[0] == "cuda":
        return _cuda(text)
    words = text.lower().split()
    found = [d for key, d in table().items() if all(w in key.lower() for w in words)]
    if not found:
        raise ConfigError(
            f"device={text!r} is not known{nearest(text, table()) or '.'} Known: cpu, cuda, {listing(table(), 40)}."
        )
    return found[0]


def _cuda(text: str) -> Device:
    if not torch.cuda.is_available():
        raise ConfigError(f"device={text!r}, but torch sees no CUDA device here. Name one: {listing(table(), 40)}.")
    facts = torch.cuda.get_device_properties(torch.device(text))
    known = next((d for key, d in table().items() if facts.name.startswith(key)), None)
    if known is not None:
        return Device(**{**vars(known), "memory": facts.total_memory, "here": True})
    return _measured(facts.name, "cuda", facts.total_memory)


@functools.cache
def _cpu() -> Device:
    return _measured("this machine's CPU", "cpu", main_memory() or 2**33)


def _measured(name: str, kind: str, memory: int) -> Device:
    """The rates of a device that is here, from two short products and a copy."""
    single, half = (_rate(kind, dtype) for dtype in (torch.float32, torch.bfloat16))
    data = torch.zeros(2**24, device=kind)
    seconds = _best(lambda: data.clone(), kind)
    source = "measured: products of 512 x 512 (CPU) or 4096 x 4096, and a copy of 64 MiB"
    return Device(name, kind, half, single, 2 * data.numel() * 4 / seconds, memory, source, here=True)


def _rate(kind: str, dtype: torch.dtype) -> float:
    n = 512 if kind == "cpu" else 4096
    a = torch.zeros(n, n, dtype=dtype, device=kind)
    return 2 * n**3 / _best(lambda: a @ a, kind)


def _best(step: Callable[[], object], kind: str, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        step()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)
