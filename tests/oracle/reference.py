# SPDX-License-Identifier: Apache-2.0
"""The reference, in the same process: the same layer adapted by both, with the same tensors in both."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.config import PeftConfig
from graftlet.testing.benches import seeded
from tests.laws.cases import Case

peft = pytest.importorskip("peft", reason="the reference is not installed: pip install peft==0.21.2")


class _BlockDiagonal:
    """The one operation of the reference's CUDA extension for BOFT, without which it makes no butterflies."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


_boft = importlib.import_module("peft.tuners.boft.layer")
_boft.get_fbd_cuda = lambda: True  # type: ignore[attr-defined]
_boft.FastBlockDiag = _BlockDiagonal  # type: ignore[attr-defined]

REFUSALS = (TypeError, ValueError, KeyError, NotImplementedError, AttributeError, RuntimeError)
"""What the reference raises for a layer that it does not support."""


def config_of(ours: PeftConfig) -> Any:
    """The reference's config with the same values."""
    known = {f.name for f in fields(ours)}
    values = {k: v for k, v in ours.to_dict().items() if k in known and k not in ("peft_type", "runtime_config")}
    return getattr(peft, type(ours).__name__)(**values)


@dataclass
class Pair:
    """One adapted model by the reference, one by Graftlet."""

    theirs: nn.Module
    ours: nn.Module


def adapt(case: Case, dtype: torch.dtype = torch.float32, in_place: bool = False) -> Pair:
    """The case's layer adapted by both. Skips what the reference does not have.

    in_place: by `inject_adapter_in_model`, which keeps adapters in the base's dtype; by `get_peft_model` otherwise.
    """
    config = case.config()
    if config.target_parameters and case.entry.name != "LORA":
        pytest.skip("the reference adapts bare parameters by LoRA alone")
    theirs = case.bench.model(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = peft.inject_adapter_in_model if in_place else _swapped(peft.get_peft_model)
            theirs = made(config_of(config), theirs).eval()
        except REFUSALS as error:
            pytest.skip(f"not in the reference: {str(error)[:80]}")
    if not any(".default" in key for key in theirs.state_dict()):
        pytest.skip("not in the reference, which passes over the layer in silence")
    made = graftlet.inject_adapter_in_model if in_place else _swapped(graftlet.get_peft_model)
    ours = made(config, case.bench.model(dtype)).eval()
    move(theirs)
    return Pair(theirs, ours)


def _swapped(function: Any) -> Any:
    return lambda config, model: function(model, config)


@torch.no_grad()
def move(model: nn.Module, by: float = 0.2) -> None:
    """Move what learns away from its start."""
    with seeded(7):
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * by)


@torch.no_grad()
def output(model: nn.Module, inputs: tuple[Tensor, ...], case: Case) -> Tensor:
    """The model's output. Poly, in the reference, cannot do without the rows' tasks, and takes them below its wrapper."""
    tuner = getattr(model, "base_model", model)
    if type(tuner).__name__ == "PolyModel":
        return tuner(*inputs, task_ids=torch.zeros(len(inputs[0]), dtype=torch.int64))
    return model(*inputs, **case.call)
