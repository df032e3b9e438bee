# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a method beside running it: the change it makes, its factors, the weight that it came from.

`Method` has all of it, from `apply` alone; a method says more where it knows more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config import PeftConfig
    from ..weights.site import Site
    from .group import Group
    from .method import Stage, View, Weights
    from .settled import Lean, Settled

ROUNDS = 40


@dataclass(frozen=True)
class Factors:
    """A change of a weight as products of thin matrices, one a group of a convolution or expert of a stack.

    A: `[cells, r, columns]`. B: `[cells, out, r]`. scale: the change is `scale B A`.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0


class Thin(NamedTuple):
    """An update that is just `scale x A^T B^T`: A `[r, in]`, B `[out, r]`. rate: the share of x that dropout takes."""

    A: Tensor
    B: Tensor
    scale: float
    rate: float = 0.0


class Algebra:
    """The questions.

    universal: any change of low rank, and of a bias, can be put into this method's tensors (`holding`, `hold`).
    additive: the weighted sum of adapters is, by definition, the adapter of the weighted sums of their tensors.
    exchangeable: settings that another adapter may bring in place of these; they may be tensors, for compiled models.
    scales: fields of the config that tell nothing but ranks and those settings.
    """

    universal: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    exchangeable: ClassVar[tuple[str, ...]] = ("scaling",)
    scales: ClassVar[tuple[str, ...]] = ()
    derives: ClassVar[bool] = False
    """Its thin factors are made from its tensors, in each call that learns."""

    if TYPE_CHECKING:

        def apply(self, p: View, W: Tensor, b: Tensor | None) -> Weights: ...

    def change(self, p: View, W: Tensor, b: Tensor | None) -> Weights:
        """What the adapter adds to this weight, and to this bias."""
        W1, b1 = self.apply(p, W, b)
        return W1 - p.site.fit(W, W1), None if b1 is None else b1 if b is None else b1 - b

    def change_bias(self, p: View, weights: Callable[[], Weights]) -> Tensor | None:
        """What the adapter adds to the bias; `weights` reads the layer's, if they are needed."""
        return self.change(p, *weights())[1]

    def factored(self, p: View) -> Factors | None:
        """The change of the weight as factors; None where it has none, or they are not known."""
        return None

    def thin(self, p: View) -> Thin | None:
        """What a call adds, dropout included, where that is two thin products and torch's own dropout on a linear layer;
        None where it may be more.
        """
        return None

    def grouped(self, views: Sequence[View], before: Stage) -> Group | None:
        """Several adapters as one computation on the stage before; None where they have to run one by one."""
        return None

    def settled(self, p: View, before: Stage) -> Settled | None:
        """What the adapter does in inference on the stage before, of tensors at hand; None where there is more to it."""
        return None

    def lean(self, p: View, before: Stage) -> Lean | None:
        """The layer's output as a function of its input alone, in training, while what it is made of stands where it
        stands; None where there is more to it. What stands in the tensors is read in each call.
        """
        return None

    def inverse(self, p: View, W: Tensor, b: Tensor | None) -> Tensor:
        """The weight from which `apply` makes W, as nearly as can be found; whatever is not found out is not exact.

        In general by iteration, which finds it where `back` takes an adapter back to less than the weight itself.
        """
        back = self.back(p, W)
        found, missed, least = torch.zeros_like(W), W, float("inf")
        for _ in range(ROUNDS):
            nearer = found + back(missed)
            missed = W - self.apply(p, nearer, b)[0]
            size = float(missed.abs().max())
            if not size < least:
                break
            found, least = nearer, size
        return found

    def back(self, p: View, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Roughly the inverse of `apply`, as a map of weights such as `like`."""
        return lambda W: W

    def holding(self, like: PeftConfig, ranks: Mapping[str, tuple[int, Site]], bias: bool) -> PeftConfig:
        """The config of an adapter that can hold changes of these ranks, by layer; else as `like` says."""
        raise NotImplementedError

    def recorded(self, config: PeftConfig, held: Sequence[View]) -> None:
        """Let a config say what an adapter's layers hold, after its ranks or settings were changed on them."""

    def hold(self, p: View, factors: Factors, bias: Tensor | None) -> None:
        """Fill the adapter's tensors, so that it makes this change: of at most its own rank."""
        raise NotImplementedError


def solved(matrix: Tensor, rows: Tensor) -> Tensor:
    """The rows that a matrix turns into `rows` by multiplication from the right."""
    flat = rows.double().reshape(-1, rows.shape[-1])
    return torch.linalg.solve(matrix.double(), flat, left=False).reshape(rows.shape).to(rows)
