# SPDX-License-Identifier: Apache-2.0
"""A back end that is missing here is skipped with the reason, in every test that is given it; and what a back end does on
some CPUs alone is left to tests of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from .backends import Backend
from .formats import Format


def pytest_collection_modifyitems(items: Iterable[Any]) -> None:
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if missing := next((v.missing for v in given if isinstance(v, (Backend, Format)) and v.missing), None):
            item.add_marker(pytest.mark.skip(reason=missing))


def wrong_on_this_cpu() -> bool:
    """Whether bitsandbytes reads rows that are no whole blocks of 64 wrongly, as its kernels for AVX-512 do."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    W = torch.linspace(-1, 1, 2 * 96).reshape(2, 96)
    return bool((dequantize_4bit(*quantize_4bit(W, quant_type="nf4")) - W).abs().max() > 0.2)


def dequantised(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Its own way for other devices, in plain torch."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    code = _get_4bit_code(quant_type, A.device)
    return _dequantize_4bit_compute(A.view(torch.uint8).reshape(-1), absmax, code, blocksize, shape, dtype)


if importlib.util.find_spec("bitsandbytes"):
    import bitsandbytes.nn.modules as bnb

    # For CPUs with AVX512-BF16 it lays weights out anew, as they are first called for inference: multiples of 32 outputs and 64
    # inputs. Smaller layers, as here, break without any adapter; a test of its own has larger ones.
    bnb.has_avx512bf16 = lambda: False
    if wrong_on_this_cpu():
        _library = torch.library.Library("bitsandbytes", "IMPL")
        _library.impl("dequantize_4bit", dequantised, "CPU", allow_override=True)
