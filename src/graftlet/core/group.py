# SPDX-License-Identifier: Apache-2.0
"""Several adapters of a layer as one computation: the rows of a batch, each with its own adapter's factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .algebra import Factors


@dataclass(frozen=True)
class Group:
    """Adapters of a layer, by their number in the group.

    A: `[n, r, in]`. B: `[n, out, r]`, with the scale in it. Lower ranks are filled up with zeros. dtype: inputs are brought
    to it; None: they stay as they are. gain: `[n, out]`, by which each multiplies what the layer gives without its bias,
    the change included; None: nothing does.
    """

    A: Tensor
    B: Tensor
    dtype: torch.dtype | None = None
    gain: Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[Factors], dtype: torch.dtype | None) -> Group:
        """Factors side by side."""
        r = max(f.A.shape[1] for f in parts)
        A = torch.stack([pad(f.A[0], (0, 0, 0, r - f.A.shape[1])) for f in parts])
        B = torch.stack([pad(f.B[0], (0, r - f.B.shape[2])) * f.scale for f in parts])
        return cls(A, B, dtype)

    def added(self, x: Tensor, owner: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        """What is added to the layer's output for rows `x [n, ..., in]`, each by the adapter of its owner's number.

        plain: gives the layer's output for these rows, without its bias.
        """
        if self.dtype is not None and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        rows = x.reshape(len(x), -1, x.shape[-1])
        y = rows @ self.A.index_select(0, owner).mT @ self.B.index_select(0, owner).mT
        y = y.reshape(*x.shape[:-1], -1)
        if self.gain is None:
            return y
        gain = self.gain.index_select(0, owner).reshape(len(x), *[1] * (x.dim() - 2), -1)
        return plain() * (gain - 1) + y * gain


class LastGroup:
    """The group that a layer used last, for as long as all that it was made from is the same.

    It is kept in inference alone. What it was made from is known by place and version, so it does not see what is written
    through a tensor's `.data`. A copy of a layer starts without.
    """

    def __init__(self) -> None:
        self._held: tuple[list[Any], list[Any], Group] | None = None

    def clear(self) -> None:
        """Forget it."""
        self._held = None

    def get(self, sources: list[Any], make: Callable[[], Group | None]) -> Group | None:
        """The group of these sources (tensors, and plain values that are compared), made where it is not at hand."""
        idle = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if idle or any(isinstance(s, Tensor) and s.is_inference() for s in sources):
            return make()
        held, marks = self._held, [_mark(s) for s in sources]
        if held is not None and held[1] == marks:
            return held[2]
        made = make()
        kept = [s.detach() for s in sources if isinstance(s, Tensor)]  # so that no other tensor comes to their places
        self._held = None if made is None else (kept, marks, made)
        return made

    def __deepcopy__(self, memo: Any) -> LastGroup:
        return LastGroup()

    def __reduce__(self) -> tuple[type[LastGroup], tuple[()]]:
        return LastGroup, ()


def _mark(source: Any) -> Any:
    if isinstance(source, Tensor):
        return (source.data_ptr(), source._version, source.dtype, source.shape)
    return source
