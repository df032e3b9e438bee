# SPDX-License-Identifier: Apache-2.0
"""Whether two runs of a job saw the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

NEAR = 1e-4
"""How far apart two numbers may be, as a share of the largest beside them: ten steps of training add rounding up."""


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    """Every place where what was seen differs, and how."""
    if isinstance(theirs, (torch.Tensor, float)) and isinstance(ours, (torch.Tensor, float)):
        yield from _apart(torch.as_tensor(theirs).double(), torch.as_tensor(ours).double(), path)
    elif isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(k for k in ours if k not in theirs)]:
            if key in theirs and key in ours:
                yield from differences(theirs[key], ours[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}: only with {'the reference' if key in theirs else 'the drop-in'}"
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            yield from differences(one, other, f"{path}[{number}]")
    elif theirs != ours:
        yield f"{path}: {str(theirs)[:200]} with the reference, {str(ours)[:200]} with the drop-in"


def _apart(theirs: torch.Tensor, ours: torch.Tensor, path: str) -> Iterator[str]:
    if theirs.shape != ours.shape:
        yield f"{path}: of shape {list(theirs.shape)} with the reference, {list(ours.shape)} with the drop-in"
        return
    scale, off = theirs.abs().max().item() if theirs.numel() else 0.0, (theirs - ours).abs()
    if off.numel() and not off.max().item() <= NEAR * max(scale, 0.1):  # so that NaN counts as a difference
        yield f"{path}: apart by {off.max().item():.2g}, of {scale:.2g}"
