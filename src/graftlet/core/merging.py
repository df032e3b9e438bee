# SPDX-License-Identifier: Apache-2.0
"""What is kept of a weight while adapters are merged into it, so that its very bits come back.

The merged weight is led back through the adapters, as they were when they were merged. That gives the original up to
rounding; the rest is kept in seven bits an element (`weights.residual`). Where an adapter cannot be led back, because
many weights would give the same merged one, the original itself is kept.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..weights.residual import Residual, residual
from ..weights.rounding import judged, note
from ..weights.site import Site
from ..weights.whole import in_parts
from .kernel import without_autocast
from .method import Method, View, Weights

if TYPE_CHECKING:
    from .layer import AdaptedLayer


@dataclass(frozen=True)
class Step:
    """One merged adapter, as it was then. nbytes: of the copies that this takes."""

    method: Method
    view: View
    nbytes: int

    def back(self, W: Tensor, b: Tensor | None) -> Tensor:
        """The weight before this adapter."""
        held = {k: v.to(W.device) for k, v in vars(self.view).items() if isinstance(v, (Tensor, nn.Module))}
        return self.method.inverse(self.view.over(held), W, b)


@dataclass(frozen=True)
class Kept:
    """What brings a layer's original back. whole: what the storage saved, where that is kept instead of a residual."""

    steps: tuple[Step, ...] = ()
    rest: Residual | None = None
    bias: Tensor | None = None
    whole: tuple[Any, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Memory beside the model's own."""
        if self.rest is not None:
            return self.rest.nbytes + sum(step.nbytes for step in self.steps)
        return sum(t.nbytes for t in self.whole or () if isinstance(t, Tensor))

    def original(self, site: Site) -> Weights:
        """The weight `[out, in, *kernel]` and bias, to the bit. Raises `MergeError` where something else changed it."""
        if self.rest is None:
            assert self.whole is not None
            return site.original(self.whole)
        found = self.rest.restored(led_back(site, site.weight, self.steps, self.bias))
        if found is None:
            raise MergeError(
                f"a {type(site.module).__name__}'s weight was changed, or put into another dtype, while adapters were "
                "merged into it, so its original cannot be brought back; load the base again, and unmerge first next time."
            )
        return site.canonical(found), self.bias

    def restore(self, site: Site) -> None:
        """Bring them back into the layer."""
        if self.rest is None:
            assert self.whole is not None
            site.restore(self.whole)
        else:
            site.write(*self.original(site))


@torch.no_grad()
def led_back(site: Site, kept: Tensor, steps: Sequence[Step], bias: Tensor | None) -> Tensor:
    """An estimate of the original in the kept layout and dtype, from a merged weight as the layer keeps it."""
    wide = torch.promote_types(kept.dtype, torch.float32)
    W, b = site.canonical(kept.detach()).to(wide), None if bias is None else bias.to(kept.device, wide)
    with exactly(kept.device):
        for step in reversed(steps):
            W = step.back(W, b)
    return site.kept(W).to(kept.dtype)


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Products in full single precision, whatever the caller has chosen for speed."""
    with without_autocast(device):
        if torch.get_float32_matmul_precision() == HIGHEST:
            yield
            return
        with _choice:  # it is one for all threads
            before = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision(HIGHEST)
                yield
            finally:
                torch.set_float32_matmul_precision(before)


HIGHEST = "highest"
_choice = threading.RLock()


@torch.no_grad()
def write(layer: AdaptedLayer, merged: Weights, names: Sequence[str]) -> Kept:
    """Put a merged weight into a layer, and return what brings the original back, in as little memory as can be.

    Where anything fails, the layer has the weight that it had.
    """
    site = layer.site
    site.check_writable()
    if not site.storage.exact or in_parts(site.weight):
        return _write_packed(layer, merged)
    with restored_on_error(site) as before:
        W, b = site.original(before) if layer.kept is None else layer.original()
        kept = _kept(layer, names, site.kept(W), b, site.kept(merged[0]).to(site.weight.dtype))
        site.write(*merged)
        if type(site.weight) not in ORDINARY:  # nobody here knows whether it took what was written
            judged(site, merged[0], site.original(before)[0])
    return kept


@contextmanager
def restored_on_error(site: Site) -> Iterator[Any]:
    """Give what a layer keeps, which it has again where the block fails."""
    before = site.save()
    try:
        yield before
    except BaseException:
        site.restore(before)
        raise


def _kept(layer: AdaptedLayer, names: Sequence[str], W: Tensor, b: Tensor | None, merged: Tensor) -> Kept:
    """What brings a plain weight, in the kept layout, back from a merged one that is to stand in its place."""
    bias = None if b is None else b.detach().clone()
    made = Kept(steps := _steps(layer, names, True), residual(W, led_back(layer.site, merged, steps, bias)), bias)
    if made.nbytes > W.numel():
        made = replace(made, steps=_steps(layer, names, False))
    whole = made.rest is None or made.nbytes >= W.nbytes
    return Kept(whole=(W.detach().clone(), bias)) if whole else made


ORDINARY = (nn.Parameter, Tensor)


def _write_packed(layer: AdaptedLayer, merged: Weights) -> Kept:
    """Where a weight is rounded as it is written, or in parts: read back, and put back where that is not what was meant."""
    site = layer.site
    with restored_on_error(site) as before:
        kept = Kept(whole=before) if layer.kept is None else layer.kept
        site.write(*merged)
        lost = judged(site, merged[0], kept.original(site)[0])
        note(site, None if site.storage.exact else lost)  # rounded to its own dtype, as ever
    return kept


def _steps(layer: AdaptedLayer, names: Sequence[str], copies: bool) -> tuple[Step, ...]:
    return tuple(_step(layer, name, copies) for name in names)


def _step(layer: AdaptedLayer, name: str, copies: bool) -> Step:
    """An adapter, with copies of what learns: it may have changed by the time that the weight is led back.

    Large adapters are not copied; where one is changed by other ways than the library's while it is merged, the original
    is lost, which is noticed.
    """
    view = layer.view(name, torch.promote_types(layer.site.dtype, torch.float32))
    fixed = {id(layer.tensor(name, t)) for t, spec in layer.specs[name].items() if not spec.trainable}
    held: dict[str, Any] = {"training": False}
    size = 0
    for key, value in vars(view).items():
        if isinstance(value, nn.Module) and not isinstance(value, nn.Identity):
            held[key] = copy.deepcopy(value).eval()
        elif isinstance(value, nn.Parameter) and copies:
            held[key] = value.detach().clone()
        size += held[key].nbytes if isinstance(held.get(key), Tensor) else 0
        if (
            not isinstance(value, nn.Parameter)
            and isinstance(value, Tensor)
            and id(value) not in fixed
            and key not in view.shared
        ):
            size += value.nbytes  # made for this view
    return Step(layer.methods[name], view.over(held), size)
