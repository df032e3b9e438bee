# SPDX-License-Identifier: Apache-2.0
"""Quantised linear layers of the smaller back ends: real ones where their package is here, else stand-ins of their layout."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlet.weights.site import site_of

OUT, IN = (512, 1024) if torch.cuda.is_available() else (96, 160)  # AQLM's GPU kernels are wrong on small layers
GROUP = 32


@dataclass(frozen=True)
class Format:
    """One way to quantise a linear layer.

    needs: packages without which there is none. make: the layer, quantised; the given one is left alone. call: how far its
    output may be from the product with what is read, relative to the largest; None where it needs a GPU or a kernel that
    cannot be had here. rounding: how much of a weight rounding loses at most, as a share of the norm. writes: another
    weight can be kept. back: why its package cannot lead a gradient back through it here.
    """

    name: str
    needs: tuple[str, ...]
    make: Callable[[nn.Linear], nn.Module]
    call: float | None
    rounding: float
    writes: bool = False
    back: str | None = None

    @property
    def missing(self) -> str:
        """Why there is none here; empty where there is."""
        names = ", ".join(n for n in self.needs if importlib.util.find_spec(n) is None)
        return f"{names} is not installed" if names else ""

    def __str__(self) -> str:
        return self.name


def hqq(bits: int, axis: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
        return HQQLinear(copy.deepcopy(plain), config, compute_dtype=dtype, device="cpu")

    return make


def grouped(plain: nn.Linear, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Integers `[out, in]`, and scales and integer zeros `[out, groups]`: each group's range in equal steps."""
    groups = plain.weight.detach().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).int(), scales, zeros.int()


def packed(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of 4 bits a 32-bit word along the last dimension, in this order from the lowest bits up."""
    parts = codes.unflatten(-1, (-1, 8))[..., list(order)].to(torch.int64)
    words = (parts << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(plain: nn.Linear, kernel: str = "torch.TorchLinear") -> nn.Module:
    home, _, kind = kernel.partition(".")
    codes, scales, zeros = grouped(plain)
    made: Any = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{home}"), kind)(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=True
    )
    made.qweight.copy_(packed(codes).T)
    made.qzeros.copy_(packed(zeros.T))
    made.scales.copy_(scales.T)
    made.g_idx.copy_(torch.arange(IN) // GROUP)
    made.bias.copy_(plain.bias.detach())
    made.qzero_format(format=2)  # as they are, where files of the first format have them less one
    made.optimized = True  # not compiled, which takes half a minute
    made.post_init()
    return made


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(plain: nn.Linear) -> nn.Module:
    from awq.modules.linear.gemm import WQLinear_GEMM

    return filled(WQLinear_GEMM(4, GROUP, IN, OUT, True, "cpu"), plain)


def awq_of_gptqmodel(plain: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    made = AwqTorchLinear(
        bits=4,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        in_features=IN,
        out_features=OUT,
        bias=True,
        register_buffers=True,
    )
    filled(made, plain).post_init()
    return made


def filled(made: Any, plain: nn.Linear) -> Any:
    """An AWQ layer with the tensors of its format."""
    codes, scales, zeros = grouped(plain)
    made.qweight.copy_(packed(codes.T, AWQ_ORDER))
    made.qzeros.copy_(packed(zeros.T, AWQ_ORDER))
    made.scales.copy_(scales.T)
    made.bias.copy_(plain.bias.detach())
    return made.eval()


def aqlm(plain: nn.Linear) -> nn.Module:
    """Codebooks that hold a little of everything: not the given weight, but some."""
    from aqlm import QuantizedLinear

    if not torch.cuda.is_available():
        import numba

        numba.set_num_threads(1)  # several get in each other's way
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32  # its kernels' for each
    made = QuantizedLinear(IN, OUT, 8, 1, 2, 8, bias=True, dtype=dtype, device="cpu").requires_grad_(False)
    nn.init.normal_(made.codebooks, std=0.05)
    nn.init.uniform_(made.scales, 0.5, 1)
    made.codes.copy_(torch.randint(-128, 128, made.codes.shape, dtype=torch.int8))
    made.bias.copy_(plain.bias.detach())
    return made


def eight(name: str, *args: Any, **kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    """A layer of 8-bit floats that transformers has."""

    def make(plain: nn.Linear) -> nn.Module:
        home, _, kind = name.rpartition(".")
        made = getattr(importlib.import_module(f"transformers.integrations.{home}"), kind)(IN, OUT, *args, **kwargs)
        made.requires_grad_(False)
        made.bias.copy_(plain.bias.detach())
        site = site_of(made)
        assert site is not None
        site.write(plain.weight.detach(), None)
        return made

    return make


FORMATS = [
    Format("hqq-8", ("hqq",), hqq(8), 1e-6, 0.005, True),
    Format("hqq-4", ("hqq",), hqq(4), 1e-6, 0.09, True),
    Format("hqq-3", ("hqq",), hqq(3), 1e-6, 0.18, True),
    Format("hqq-2", ("hqq",), hqq(2), 1e-6, 0.4, True),
    Format("hqq-4-columns", ("hqq",), hqq(4, axis=0), 1e-6, 0.09, True),
    Format("hqq-4-brain", ("hqq",), hqq(4, dtype=torch.bfloat16), 2e-2, 0.09, True),
    Format("gptq", ("gptqmodel", "optimum"), gptq, 2e-3, 0.09),
    Format(
        "awq",
        ("awq",),
        awq,
        2e-3,
        0.09,
        back=None if torch.cuda.is_available() else "autoawq 0.2.9 has a gradient only with triton",
    ),
    Format("awq-gptqmodel", ("gptqmodel", "optimum"), awq_of_gptqmodel, 2e-3, 0.09),
    Format(
        "aqlm",
        ("aqlm",) if torch.cuda.is_available() else ("aqlm", "numba", "scipy"),
        aqlm,
        1e-5,
        float("inf"),
        back="the gradient of aqlm 1.1.7 fails on a CPU, and on a GPU for these sizes",
    ),
    Format(
        "fp8-blocks", ("transformers",), eight("finegrained_fp8.FP8Linear", (64, 64), has_bias=True), None, 0.04, True
    ),
    Format("fp8-tensor", ("transformers",), eight("finegrained_fp8.FP8Linear", has_bias=True), None, 0.04, True),
    Format("fp8-fbgemm", ("transformers",), eight("fbgemm_fp8.FbgemmFp8Linear", True), None, 0.04, True),
    Format(
        "fp8-compressed",
        ("transformers",),
        eight("compressed_tensors.CompressedTensorsFP8Linear", True),
        0.05,
        0.04,
        True,
        back="torch has no gradient of a scaled product",
    ),
]
