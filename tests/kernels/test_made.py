# SPDX-License-Identifier: Apache-2.0
"""Thin factors that a method makes from its tensors, in one step with the layer's product: as the plain way has it."""

from __future__ import annotations

import pytest
import torch

from graftlet.core import kernel
from graftlet.kernels import lowrank
from graftlet.methods.parts.low_rank import LowRank
from graftlet.testing.case import Case
from tests.kernels.alike import LINEAR, outcome, turn

MADE = [c for c in LINEAR if issubclass(c.entry.method, LowRank) and c.entry.method.update is LowRank.update]


@pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MADE, ids=str)
def test_a_step_is_the_plain_one(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[bool] = []

    def spy(*given: object) -> torch.Tensor | None:
        served.append((found := forward(*given)) is not None)
        return found

    forward = lowrank.forward
    monkeypatch.setattr(lowrank, "worth", lambda x: 0)
    monkeypatch.setattr(lowrank, "forward", spy)
    try:
        turn(monkeypatch, False)
        wanted = outcome(case, dtype)
        turn(monkeypatch, True)
        found = outcome(case, dtype)
    finally:
        monkeypatch.undo()
        kernel.kernels.cache_clear()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
        assert off < (1e-5 if dtype == torch.float32 else 0.06), f"{name} is off by {off:.1e}"
    assert any(served)


@pytest.mark.parametrize("rows", [1, 1 << 15])
def test_few_inputs_take_the_plain_way(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would save the products, it would cost the host."""
    x = torch.randn(rows, 32)
    assert (x.numel() < lowrank.worth(x)) == (rows == 1)
