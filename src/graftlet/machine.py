# SPDX-License-Identifier: Apache-2.0
"""What this machine has."""

from __future__ import annotations

import functools
import os
from pathlib import Path

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def main_memory() -> int | None:
    """Bytes of main memory; of a container, what it may take. None where the system does not tell."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for file in map(Path, LIMITS):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            whole = min(whole, int(text))
    return whole
