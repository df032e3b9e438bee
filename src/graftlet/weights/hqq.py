# SPDX-License-Identifier: Apache-2.0
"""HQQ: integers of 8 to 1 bits in groups, each with a scale and a zero that is no integer.   W = (Q - z) s

Since the zero may be any number, a change that is the same all over a group is kept without rounding anything anew: the
zero moves by it, `z - D / s`. That is how QA-LoRA (arXiv 2309.14717) merges.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from hqq.core.quantize import HQQLinear  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from .storage import Packed

SAME = 16
"""How many units in the last place of the largest number the change may differ within a group, and be called the same."""


class HQQ(Packed):
    """`HQQLinear`. Whatever else is written is quantised as the layer's own config says."""

    backend = "HQQ"

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        return _own(module).W_q

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size(_own(module).meta["shape"])

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return _own(module).compute_dtype

    @torch.no_grad()
    def read(self, module: nn.Module, name: str) -> Tensor:
        return _own(module).dequantize()

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        layer = _own(module)
        value = value.to(layer.W_q.device, torch.float32)
        zero = _moved(layer, value)
        if zero is not None:
            layer.meta["zero"] = zero
            return
        config = {**copy.deepcopy(layer.quant_config), "offload_meta": layer.offload_meta}
        device, dtype = str(layer.W_q.device), layer.compute_dtype
        given = HQQLinear.from_weights(value.clone(), None, config, compute_dtype=dtype, device=device)
        layer.W_q, layer.meta = given.W_q, given.meta

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        """A step: half of one for rounding, and as much for where HQQ moves the zero."""
        layer = _own(module)
        grouped = layer.dequantize().float().reshape(_groups(layer.meta))
        steps = (
            layer.meta["scale"].float().expand_as(grouped) + grouped.abs().amax() * torch.finfo(layer.compute_dtype).eps
        )
        return steps.reshape(meant.shape)

    def save(self, module: nn.Module, name: str) -> Any:
        layer = _own(module)
        return layer.W_q.detach().clone(), copy.deepcopy(layer.meta)

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        layer = _own(module)
        device = layer.W_q.device
        meta = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in copy.deepcopy(saved[1]).items()}
        layer.W_q, layer.meta = nn.Parameter(saved[0].to(device, copy=True), requires_grad=False), meta


HQQ_LAYERS = HQQ()


def _own(module: nn.Module) -> Any:
    return module


def _groups(meta: dict[str, Any]) -> tuple[int, int]:
    """The shape of the weight with a group in each row, or in each column."""
    return (-1, meta["group_size"]) if meta["axis"] == 1 else (meta["group_size"], -1)


def _moved(layer: Any, value: Tensor) -> Tensor | None:
    """The zeros by which the layer has this weight, its integers and scales as they are; None where there are none."""
    meta, axis = layer.meta, layer.meta["axis"]
    if "zero" not in meta or "scale" not in meta:
        return None
    change = (value - layer.dequantize().float()).reshape(_groups(meta))
    low, high = change.aminmax(dim=axis, keepdim=True)
    if ((high - low).max() > SAME * torch.finfo(torch.float32).eps * value.abs().max()).item():
        return None
    zero = meta["zero"]
    return (zero.float() - change.mean(axis, keepdim=True) / meta["scale"].float()).to(zero.dtype)
