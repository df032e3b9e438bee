# SPDX-License-Identifier: Apache-2.0
"""What is read from a file straight onto a GPU: through pages that the GPU reads itself, one filled while another is read."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PAGE = 1 << 21
"""Bytes that go at once. Each thread that reads has two pages."""


class Staged(threading.local):
    """A thread's two pages, and when each may be filled again. They serve one device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device, self.turn = device, 0
        with torch.cuda.device(device):
            self.pages = [torch.empty(PAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self.free = [torch.cuda.Event() for _ in self.pages]

    def fill(self, made: Tensor, read: Callable[[memoryview, int], None]) -> None:
        """Fill a tensor on the device. read: fills a piece of memory from a place that is counted from the tensor's start.

        What is on its way is done when the device's default stream is.
        """
        import torch

        flat = made.view(-1).view(torch.uint8)
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.default_stream(self.device)):
            for at in range(0, len(flat), PAGE):
                self.turn = 1 - self.turn
                page, free = self.pages[self.turn], self.free[self.turn]
                size = min(PAGE, len(flat) - at)
                free.synchronize()
                read(memoryview((ctypes.c_ubyte * size).from_address(page.data_ptr())), at)
                flat[at : at + size].copy_(page[:size], non_blocking=True)
                free.record()
