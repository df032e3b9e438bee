# SPDX-License-Identifier: Apache-2.0
"""Thin factors that a method makes from its tensors, in one step with the layer's product: as the plain way has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graftlet
from graftlet.core import kernel
from graftlet.core.layer import AdaptedLayer
from graftlet.core.together import Together
from graftlet.kernels import lowrank
from graftlet.methods.parts import low_rank
from graftlet.methods.parts.low_rank import LowRank
from graftlet.testing.case import Case
from graftlet.testing.running import adapted
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


@pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")
@pytest.mark.parametrize("case", MADE, ids=str)
def test_factors_are_kept_in_inference_and_follow_every_write(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "KEPT", 0)
    model = adapted(case).eval()
    model.set_adapter("default", inference_mode=True)
    (x,) = case.bench.example(torch.float32)
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLayer))

    def both() -> list[Tensor]:
        with torch.no_grad():
            return [model(x), model(x)]

    first, again = both()
    assert torch.equal(first, again)
    assert layer._lone._held is not None, "nothing was kept"
    held = layer._lone._held.made
    with torch.no_grad():
        for tensor in [p for n, p in model.named_parameters() if "base_layer" not in n]:
            tensor.add_(0.1)
        after, _ = both()
        monkeypatch.setattr(Together, "_by_itself", lambda *given: None)
        plain, _ = both()
    assert layer._lone._held.made is not held
    assert torch.allclose(after, plain, rtol=1e-5, atol=1e-5)


def test_wide_factors_are_not_kept() -> None:
    """They would take as much memory as what layers share was to save."""
    torch.manual_seed(0)
    config = graftlet.VeraConfig(r=16, target_modules=["0"])
    model = graftlet.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config).eval()
    model.set_adapter("default", inference_mode=True)
    with torch.no_grad():
        model(torch.randn(2, 32))
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLayer))
    assert layer._lone._held is not None
    assert layer._lone._held.made is None


@pytest.mark.parametrize("rows", [1, 1 << 15])
def test_few_inputs_take_the_plain_way(rows: int) -> None:
    """What it would save the products, it would cost the host."""
    x = torch.randn(rows, 32)
    assert (x.numel() < lowrank.worth(x)) == (rows == 1)
