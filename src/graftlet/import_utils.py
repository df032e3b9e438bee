# SPDX-License-Identifier: Apache-2.0
"""Which optional packages are installed, under the reference's names. Nothing is imported to find out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable


def _asks(*modules: str) -> Callable[[], bool]:
    """Whether one of these modules could be imported."""

    def available() -> bool:
        return any(importlib.util.find_spec(module) is not None for module in modules)

    available.__doc__ = f"Whether {' or '.join(modules)} is installed."
    return available


is_aqlm_available = _asks("aqlm")
is_bnb_available = _asks("bitsandbytes")
is_bnb_4bit_available = _asks("bitsandbytes")
is_diffusers_available = _asks("diffusers")
is_eetq_available = _asks("eetq")
is_gptqmodel_available = _asks("gptqmodel")
is_hqq_available = _asks("hqq")
is_inc_available = _asks("neural_compressor")
is_optimum_available = _asks("optimum")
is_te_available = _asks("transformer_engine")
is_torch_tpu_available = _asks("torch_xla")
is_torchao_available = _asks("torchao")


def is_te_pytorch_available() -> bool:
    """Whether Transformer Engine is installed with its part for torch."""
    return is_te_available() and importlib.util.find_spec("transformer_engine.pytorch") is not None


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch can use an Intel GPU."""
    import torch

    return torch.xpu.is_available() if hasattr(torch, "xpu") else False
