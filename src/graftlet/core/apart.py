# SPDX-License-Identifier: Apache-2.0
"""A layer that tensor parallelism shares out: each process has some of its inputs, or makes some of its outputs.

Its adapters are whole on every process. So what comes in is put together before they act, and of what they make each process
keeps its part; between, every process computes the same, and the gradients of the adapters need no exchange. That holds for
every method, as every method is a function of whole inputs and a whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..weights.site import Site
from ..weights.whole import shared_out
from .context import Call, current


class Apart:
    """What a layer's inputs and outputs are among processes. Found out as it is called: its weight does not tell."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.cut: bool | None = None
        """Whether a call of the base layer gives a part of the outputs."""

    @classmethod
    def of(cls, site: Site) -> Apart | None:
        """That of a layer whose weight is in parts; None for any other.

        Raises `UnsupportedLayerError` where its output is no linear function of its input alone: an expert stack's.
        """
        if not shared_out(site.weight):
            return None
        if site.opaque:
            raise UnsupportedLayerError(
                f"a {type(site.module).__name__}'s weight is in parts, one a process, and its adapters act on the weight as "
                "a whole; leave it out of the targets, or put the adapter on before an engine shards the model."
            )
        return cls(site)

    @property
    def holds(self) -> bool:
        """Whether the weight is in parts now: FSDP2 puts it together for the time of a call."""
        return shared_out(self.site.weight)

    def run(self, call: Callable[[Tensor], Any], base: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        """`call` with the whole of x; of its output, what `base` would have given here."""
        if self.cut is None:
            with torch.no_grad():
                self.cut = base(x).shape[-1] != self.site.features_out
        self.narrow = x.is_floating_point() and x.shape[-1] != self.site.features_in
        y = call(self._joined(x, self.site.features_in) if self.narrow else x)
        return self._part(y) if self.cut else y

    def whole(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The base layer's whole output for a whole input."""
        y = base(self._part(x) if self.narrow else x)
        return self._joined(y, self.site.features_out) if self.cut else y

    @property
    def _mesh(self) -> Any:
        mesh = self.site.weight.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
        return mesh if mesh.ndim == 1 else mesh["tp"]

    def _joined(self, x: Tensor, size: int) -> Tensor:
        """All processes' parts; of its gradient, which is the same everywhere, each takes its own part back."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = (*x.shape[:-1], size)
        stride = torch.empty(shape, device="meta").stride()
        held = DTensor.from_local(
            x.contiguous(), self._mesh, [Shard(x.dim() - 1)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        return held.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])

    def _part(self, y: Tensor) -> Tensor:
        """This process's part; the gradient is put together from those of all parts."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        held = DTensor.from_local(y, self._mesh, [Replicate()], run_check=False)
        return held.redistribute(placements=[Shard(y.dim() - 1)]).to_local()


class SharedOut(nn.Module):
    """What a layer with adapters does where it may be shared out. apart: None where it was whole as adapters came."""

    apart: Apart | None
    base_layer: nn.Module

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self.apart is None or not self.apart.holds:
            return self.run(x, *args, **kwargs)
        if self.idle(current()):
            return self.base_layer(x, *args, **kwargs)
        base = self.base_layer
        return self.apart.run(lambda v: self.run(v, *args, **kwargs), lambda v: base(v, *args, **kwargs), x)

    def call_base(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The base layer, as if it were whole in this process."""
        if self.apart is None or not self.apart.holds:
            return self.base_layer(x, *args, **kwargs)
        return self.apart.whole(lambda v: self.base_layer(v, *args, **kwargs), x)

    def run(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of the layer with its adapters, as if it were whole in this process."""
        raise NotImplementedError

    def idle(self, call: Call | None) -> bool:
        """Whether the base layer's own output is the call's."""
        raise NotImplementedError
