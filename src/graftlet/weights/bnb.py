# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: 4 bits an element in blocks with a scale each (NF4, FP4), the scales quantised again where asked for; and
8 bits with a scale a row (LLM.int8, arXiv 2208.07339).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from .storage import Packed, Storage, rounded
from .whole import whole


class FourBit(Packed):
    """`Linear4bit`, or any layer with a `Params4bit`. Until it is moved to a device for the first time it is a plain one."""

    backend = "bnb 4bit"

    def computes_in(self, module: nn.Module, name: str) -> torch.dtype | None:
        if type(module).forward is not Linear4bit.forward or _state(module, name) is None:
            return None
        return cast(Any, module).compute_dtype

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        kept, state = self.tensor(module, name), _state(module, name)
        return kept.shape if state is None else torch.Size(state.shape)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        state = _state(module, name)
        return self.tensor(module, name).dtype if state is None else _dtype(state)

    def read(self, module: nn.Module, name: str) -> Tensor:
        return _dequantised(whole(self.tensor(module, name)).detach(), _state(module, name))

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        kept, state = self.tensor(module, name), _state(module, name)
        given = value.detach().to(kept.device, self.dtype(module, name), copy=True).contiguous()
        if state is not None:
            nested = getattr(state, "original_nested", state.nested)
            words = getattr(state, "original_storage_type", kept.dtype)
            given, state = quantize_4bit(given, None, None, state.blocksize, nested, state.quant_type, words)
        _hold(module, name, given, state)

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        state = _state(module, name)
        if state is None:
            return Storage.allowed(self, module, name, meant)
        levels = state.code.float().sort().values
        gap = float(levels.diff().max() / levels.abs().max())
        nested = float(state.state2.code.float().sort().values.diff().max()) if state.nested else 0.0
        return rounded(meant, gap / 2, state.blocksize, nested + torch.finfo(self.dtype(module, name)).eps)

    def save(self, module: nn.Module, name: str) -> Any:
        return self.tensor(module, name).detach().clone(), copy.deepcopy(_state(module, name))

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        device, state = self.tensor(module, name).device, copy.deepcopy(saved[1])
        if state is not None:
            state.to(device)
        _hold(module, name, saved[0].to(device, copy=True), state)

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        return _dequantised(*saved)


class EightBit(Packed):
    """`Linear8bitLt`. The numbers and their scales stand with the weight at first, and in the layer's state once called."""

    backend = "bnb 8bit"

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        kept = self.tensor(module, name).dtype
        return torch.float32 if kept == torch.int8 else kept

    def read(self, module: nn.Module, name: str) -> Tensor:
        return self.recall(module, name, (self.tensor(module, name).detach(), _scales(module, name)))

    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        kept = self.tensor(module, name)
        if kept.dtype != torch.int8:
            with torch.no_grad():
                kept.copy_(value)
            return
        numbers, scales, _ = int8_vectorwise_quant(value.detach().to(kept.device, torch.float16).contiguous())
        _hold_rows(module, name, numbers, scales)

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        return rounded(meant, 0.5 / 127, slack=torch.finfo(torch.float16).eps)

    def save(self, module: nn.Module, name: str) -> Any:
        scales = _scales(module, name)
        return self.tensor(module, name).detach().clone(), None if scales is None else scales.clone()

    def restore(self, module: nn.Module, name: str, saved: Any) -> None:
        device = self.tensor(module, name).device
        _hold_rows(module, name, *(None if part is None else part.to(device, copy=True) for part in saved))

    def recall(self, module: nn.Module, name: str, saved: Any) -> Tensor:
        numbers, scales = saved
        return numbers if scales is None else int8_vectorwise_dequant(numbers, scales)


FOUR_BIT, EIGHT_BIT = FourBit(), EightBit()


def _scales(module: nn.Module, name: str) -> Tensor | None:
    scales = getattr(getattr(module, name), "SCB", None)
    return cast(Any, module).state.SCB if scales is None else scales


def _hold_rows(module: nn.Module, name: str, numbers: Tensor | None, scales: Tensor | None) -> None:
    kept, state = cast(Any, getattr(module, name)), cast(Any, module).state
    kept.data = numbers
    if scales is not None:
        home = kept if state.CB is None else state
        home.CB, home.SCB = kept.data, scales


def _state(module: nn.Module, name: str) -> Any:
    """The scales and the shape, which stand beside the packed numbers; None before these are packed.

    The module has them too, for when something made a new tensor of the weight and lost them, as FSDP does.
    """
    state = getattr(getattr(module, name), "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _hold(module: nn.Module, name: str, data: Tensor, state: Any) -> None:
    kept = cast(Any, getattr(module, name))
    kept.data, kept.quant_state, kept.bnb_quantized = data, state, state is not None
    if "quant_state" in module.__dict__:
        module.__dict__["quant_state"] = state


def _dtype(state: Any) -> torch.dtype:
    return getattr(state, "original_dtype", state.dtype)


@torch.no_grad()
def _dequantised(data: Tensor, state: Any) -> Tensor:
    if state is None:
        return data
    dtype = _dtype(state)
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    return dequantize_4bit(data.reshape(-1, 1), state).to(dtype)


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The usual layout, from the other one that bitsandbytes puts a weight into as it is called on some CPUs.

    Its scales are there in half precision, and as they are then computed with.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse

    own = copy.deepcopy(state)
    own.original_nested = False  # the scales stay as they are
    data, own = inverse(data, own)
    own.absmax = state.absmax.T.reshape(-1).float()
    return data, own
