# SPDX-License-Identifier: Apache-2.0
"""What a quantised layer makes of a weight that is merged into it: read back, judged, and kept in mind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .site import Site

NOTED = "_rounding"
"""Where a layer's own module keeps what was lost in it, so that it is known when no wrapper is left."""


@dataclass(frozen=True)
class Rounding:
    """What a merge into a quantised layer lost. weight: the norm of the error as a share of the merged weight's.
    change: as a share of what the adapters change; from 1 on, nothing of the adapters may be left.
    """

    weight: float
    change: float


@torch.no_grad()
def judged(site: Site, meant: Tensor, before: Tensor) -> Rounding:
    """What was lost between the weight `meant` and what the layer now reads as, beside the weight `before`.

    Raises `MergeError` where an element is farther off than the way the layer keeps numbers can put it
    (`Storage.allowed`): half the widest gap between two levels, for the largest number that shares its scale.
    """
    off = site.read()[0].to(meant.dtype) - meant
    allowed = site.canonical(site.storage.allowed(site.module, site.name, site.kept(meant)))
    if not bool((off.abs() <= allowed * MARGIN).all()):
        worst = float((off.abs() - allowed).nan_to_num(torch.inf).max())
        raise MergeError(
            f"a {type(site.module).__name__} ({site.storage.backend or 'plain'}) did not take the merged weight: read back, "
            f"it is off by {worst:.3g} more than its precision explains. Use the adapter unmerged, or "
            "merge_and_unload(dequantize=True)."
        )
    lost = off.norm()
    return Rounding(share(lost, meant.norm()), share(lost, (meant - before).norm()))


MARGIN = 1.01
"""For the arithmetic of the comparison itself."""


def share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole else (1.0 if part else 0.0)


def note(site: Site, rounding: Rounding | None) -> None:
    """Keep in mind what was lost in a layer, or forget it."""
    noted = site.module.__dict__.setdefault(NOTED, {})
    noted.pop(site.name, None)
    if rounding is not None:
        noted[site.name] = rounding


def noted(module: nn.Module) -> Iterator[Rounding]:
    """What was lost in a module itself."""
    yield from module.__dict__.get(NOTED, {}).values()


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are; in one pass, and without a mask of them."""
    return finite_each([tensor])[0]


def finite_each(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether all numbers of each are. A device is waited for once, when all has been asked of it."""
    given = list(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(given):
        if tensor.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    found = [True] * len(given)
    for places in alike.values():
        ends = torch.stack([end for i in places for end in given[i].aminmax()])
        for i, good in zip(places, ends.isfinite().view(-1, 2).all(1).tolist(), strict=True):
            found[i] = good
    return found
