# SPDX-License-Identifier: Apache-2.0
"""A change in one product with the weight is the plain one but for rounding: for every method, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from graftlet import FourierFTConfig, ShiraConfig, SupertuningConfig, WaveFTConfig, get_peft_model
from graftlet.core import kernel
from graftlet.kernels import summed
from graftlet.testing.case import Case
from tests.kernels.alike import LINEAR, outcome, turn

FEW: dict[type, dict[str, Any]] = {
    FourierFTConfig: {"n_frequency": 20},
    ShiraConfig: {"r": 2},
    SupertuningConfig: {"sparsity": 0.9},
    WaveFTConfig: {"n_frequency": 20},
}
"""So few entries are changed as a small layer has."""


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Kernels off, or this one on for however few inputs."""

    monkeypatch.setattr(summed, "ROWS", 1)
    monkeypatch.setitem(kernel.KERNELS, "adapter", ["graftlet.kernels.summed:forward"])
    yield lambda plain: turn(monkeypatch, not plain)
    monkeypatch.undo()
    kernel.kernels.cache_clear()


@pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_an_adapter_is_the_plain_one(case: Case, plainly: Callable[[bool], None]) -> None:
    plainly(True)
    wanted = outcome(case, torch.float32)
    plainly(False)
    found = outcome(case, torch.float32)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("config", FEW)
def test_it_serves_many_inputs_alone(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), config(target_modules=["0"], **FEW[config]))
    served: list[bool] = []
    plain = summed.forward
    monkeypatch.setattr(summed, "forward", lambda *given: served.append((y := plain(*given)) is not None) or y)
    kernel.kernels.cache_clear()
    for rows, dtype in ((summed.ROWS, torch.float32), (summed.ROWS - 1, torch.float32), (summed.ROWS, torch.float64)):
        model.to(dtype)(torch.randn(rows, 32, dtype=dtype))
    monkeypatch.undo()
    kernel.kernels.cache_clear()
    assert served == [True, False, False]
