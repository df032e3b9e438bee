# SPDX-License-Identifier: Apache-2.0
"""The quantised layers that tests run on; a back end that is not here is skipped (`conftest.py`)."""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


def present(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False


@functools.cache
def compiles() -> bool:
    """Whether quanto can build what unpacks its small integers, as it does at first use; a lock that a killed build left
    behind is taken away, since all later ones would wait for it."""
    if not (shutil.which("ninja") and (shutil.which("c++") or shutil.which("g++"))):
        return False
    spec = importlib.util.find_spec("optimum.quanto")
    assert spec is not None
    assert spec.origin is not None
    for lock in Path(spec.origin).parent.glob("library/extensions/*/build/lock"):
        if time.time() - lock.stat().st_mtime > 300:
            lock.unlink(missing_ok=True)
    return True


@dataclass(frozen=True)
class Backend:
    """One way to quantise a linear layer.

    make: the layer, quantised; the given one is left alone. call: how far its output may be from the product with what is
    read, relative to the largest output. rounding: how much of a normally distributed weight its rounding loses at most,
    as a share of the norm.
    """

    name: str
    needs: str
    make: Callable[[nn.Linear], nn.Module]
    call: float
    rounding: float
    copies: bool = True
    builds: bool = False
    """It builds its kernels at first use."""

    @property
    def missing(self) -> str:
        """Why it cannot be used here; empty where it can."""
        if not present(self.needs):
            return f"{self.needs} is not installed"
        return "no compiler and ninja, with which quanto builds its kernels" if self.builds and not compiles() else ""

    def __str__(self) -> str:
        return self.name


def four_bit(
    quant_type: str, nested: bool, words: torch.dtype = torch.uint8, dtype: torch.dtype = torch.float32
) -> Any:
    """A `Linear4bit` of a layer."""

    def make(plain: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type=quant_type,
            quant_storage=words,
        )
        made.load_state_dict(plain.state_dict())
        return made.to(dtype).to("cpu")

    return make


def eight_bit(plain: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, plain.bias is not None, has_fp16_weights=False)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu")


def torchao(config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """A layer whose weight torchao quantised."""

    def make(plain: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        made = copy.deepcopy(plain).to(dtype)
        quantize_(made, config())
        return made

    return make


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def nvfp4() -> Any:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


def quanto(weights: str) -> Any:
    """A `QLinear` of a layer, frozen."""

    def make(plain: nn.Linear) -> nn.Module:
        from optimum import quanto

        made = nn.Sequential(copy.deepcopy(plain))
        quanto.quantize(made, weights=getattr(quanto, weights))
        quanto.freeze(made)
        return made[0]

    return make


BACKENDS = [
    Backend("nf4", "bitsandbytes", four_bit("nf4", False), 1e-5, 0.11),
    Backend("nf4-double", "bitsandbytes", four_bit("nf4", True), 1e-5, 0.11),
    Backend("nf4-words", "bitsandbytes", four_bit("nf4", True, torch.bfloat16), 1e-5, 0.11),
    Backend("nf4-brain", "bitsandbytes", four_bit("nf4", True, dtype=torch.bfloat16), 2e-2, 0.11),
    Backend("fp4", "bitsandbytes", four_bit("fp4", True), 1e-5, 0.15),
    Backend("int8", "bitsandbytes", eight_bit, 2e-2, 0.02),
    Backend("ao-int8", "torchao", torchao(int8), 1e-5, 0.02),
    Backend("ao-int8-brain", "torchao", torchao(int8, torch.bfloat16), 2e-2, 0.02),
    Backend("ao-fp8", "torchao", torchao(fp8), 1e-5, 0.04),
    Backend("ao-int4", "torchao", torchao(int4), 1e-5, 0.11),
    Backend("ao-nvfp4", "torchao", torchao(nvfp4), 1e-5, 0.13),
    Backend("quanto-int8", "optimum.quanto", quanto("qint8"), 1e-5, 0.02, False),
    Backend("quanto-fp8", "optimum.quanto", quanto("qfloat8"), 1e-5, 0.04, False),
    Backend("quanto-int4", "optimum.quanto", quanto("qint4"), 1e-5, 0.15, False, True),
    Backend("quanto-int2", "optimum.quanto", quanto("qint2"), 1e-5, 0.6, False, True),
]
