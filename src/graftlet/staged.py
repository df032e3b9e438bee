# SPDX-License-Identifier: Apache-2.0
"""What is read from a file straight onto a GPU: by pages that the GPU reads itself, one on its way while others are filled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PAGE = 1 << 23
READERS = 8


def memory(tensor: Tensor, size: int) -> memoryview:
    """The first bytes of a tensor in main memory, to be read or filled."""
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))


def read_onto(device: torch.device, size: int, fill: Callable[[memoryview, int], None]) -> Tensor:
    """`[size]` bytes on a GPU. fill: fills a piece of memory with what stands from a place on; called by several threads."""
    import torch

    pages: SimpleQueue[tuple[Tensor, torch.cuda.Event]] = SimpleQueue()
    with torch.cuda.device(device):
        made, stream = torch.empty(size, dtype=torch.uint8, device=device), torch.cuda.current_stream()
        for _ in range(min(2 * READERS, -(-size // PAGE))):
            pages.put((torch.empty(PAGE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))

    def piece(at: int) -> None:
        page, sent = pages.get()
        part = min(PAGE, size - at)
        sent.synchronize()
        fill(memory(page, part), at)
        with torch.cuda.stream(stream):
            made[at : at + part].copy_(page[:part], non_blocking=True)
            sent.record(stream)
        pages.put((page, sent))

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(piece, range(0, size, PAGE)))
    return made
