# SPDX-License-Identifier: Apache-2.0
"""torchao: the weight of an ordinary layer is a tensor of a special class, which says how it is quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import PerGroup, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType

from .storage import Wrapped, qualified, rounded


class TorchAO(Wrapped):
    """Any tensor class of torchao's. All that can be read are; those in `MAKERS` can be written."""

    backend = "torchao"

    def unreadable(self, module: nn.Module, name: str) -> str | None:
        kind = type(self.tensor(module, name))
        return None if hasattr(kind, "dequantize") else f"torchao's {kind.__name__} has no way back to plain numbers"

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        kind = type(self.tensor(module, name))
        if kind.__name__ in MAKERS:
            return self.unreadable(module, name)
        return (
            f"Graftlet does not know how torchao makes a {qualified(kind)}; merge_and_unload(dequantize=True) needs not"
        )

    def requantised(self, module: nn.Module, like: Any, value: Tensor) -> Tensor:
        return MAKERS[type(like).__name__](like, value)

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        like = cast(Any, self.tensor(module, name))
        half, slack = COARSENESS[type(like).__name__](like)
        block = like.block_size if isinstance(like.block_size, int) else like.block_size[-1]
        return rounded(meant, half, block, slack + torch.finfo(like.dtype).eps)


TORCHAO = TorchAO()


def _granularity(like: Any) -> Any:
    """How far a scale reaches, as torchao says it, from the shape of what has one scale."""
    rows, columns = like.block_size[-2:]
    if columns < like.shape[-1]:
        return PerGroup(columns)
    return PerRow() if rows == 1 else PerTensor()


def _int8(like: Any, value: Tensor) -> Tensor:
    calls = {k: getattr(like, k, None) for k in ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point")}
    return type(like).from_hp(value, _granularity(like), **{k: v for k, v in calls.items() if v is not None})


def _float8(like: Any, value: Tensor) -> Tensor:
    return type(like).from_hp(
        value,
        float8_dtype=like.qdata.dtype,
        granularity=_granularity(like),
        mm_config=like.mm_config,
        kernel_preference=like.kernel_preference,
        act_quant_kwargs=like.act_quant_kwargs,
    )


def _intx(like: Any, value: Tensor) -> Tensor:
    shifted = like.zero_point is not None and bool(like.zero_point.any())
    return type(like).from_hp(
        value,
        tuple(like.block_size),
        like.target_dtype,
        mapping_type=MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC,
        activation_quantization=like.activation_quantization,
    )


def _int4(like: Any, value: Tensor) -> Tensor:
    return type(like).from_hp(value, list(like.block_size))


def _nvfp4(like: Any, value: Tensor) -> Tensor:
    scale = like.per_tensor_scale
    return type(like).to_nvfp4(
        value,
        block_size=like.block_size,
        per_tensor_scale=None if scale is None else (value.abs().max().float() / NVFP4_MOST).reshape(scale.shape),
        act_per_tensor_scale=like.act_per_tensor_scale,
        is_swizzled_scales=like.is_swizzled_scales,
        use_triton_kernel=like.use_triton_kernel,
        act_quant_kwargs=like.act_quant_kwargs,
    )


NVFP4_MOST = 448.0 * 6.0
"""The largest number of the scales' type times that of the elements'."""

MAKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
    "Int4PlainInt32Tensor": _int4,
    "NVFP4Tensor": _nvfp4,
}

COARSENESS: dict[str, Callable[[Any], tuple[float, float]]] = {
    "Int8Tensor": lambda like: (1 / 255, 0),
    "Float8Tensor": lambda like: (torch.finfo(like.qdata.dtype).eps / 2, 0),
    "IntxUnpackedToInt8Tensor": lambda like: (1 / (2 ** _bits(like.target_dtype) - 1), 0),
    "Int4Tensor": lambda like: (1 / 15, 0),
    "Int4TilePackedTo4dTensor": lambda like: (1 / 15, 0),
    "Int4PlainInt32Tensor": lambda like: (1 / 15, 0),
    # levels 4 and 6 are the widest apart; a scale in eight bits is off by a sixteenth, and cannot be very small
    "NVFP4Tensor": lambda like: (17 / 16 / 6, 0 if like.per_tensor_scale is not None else 6 * 2**-10),
}
"""Half the widest gap between levels, and what scales add, as `rounded` takes them."""


def _bits(dtype: torch.dtype) -> int:
    return int("".join(c for c in str(dtype) if c.isdigit()))
