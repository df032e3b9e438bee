# SPDX-License-Identifier: Apache-2.0
"""Products in half precision are the plain ones but for their rounding: for every method, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from graftlet.core import kernel
from graftlet.kernels import half
from graftlet.testing.case import Case
from tests.kernels.alike import LINEAR, outcome, turn


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Kernels off, or on as they are where half precision is fast, on whatever device the test runs."""

    def serves(x: Tensor) -> bool:
        return x.dtype in half.HALVES and not torch.is_autocast_enabled(x.device.type)

    monkeypatch.setattr(half, "serves", serves)
    yield lambda plain: turn(monkeypatch, not plain)
    monkeypatch.undo()
    kernel.kernels.cache_clear()


@pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_an_adapter_is_the_plain_one(case: Case, plainly: Callable[[bool], None]) -> None:
    plainly(True)
    wanted = outcome(case, torch.bfloat16)
    plainly(False)
    found = outcome(case, torch.bfloat16)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
        assert off < 0.06, f"{name} is off by {off:.1%}"


@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 33), (33,)], ids=str)
def test_a_weight_in_two_halves_keeps_small_changes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    W = torch.randn(17, 33).requires_grad_()
    small = torch.randn(17, 33) * 2**-12  # far less than a half's rounding
    y, moved = half.TwoHalves.apply(x, W), half.TwoHalves.apply(x, W + small)
    wanted = x.double() @ W.double().T
    assert ((y - wanted).norm() / wanted.norm()) < 2**-8
    assert not torch.equal(y, moved)
    y.float().square().sum().backward()
    dy = 2 * y.detach().float()
    assert torch.allclose(W.grad, dy.reshape(-1, 17).T @ x.detach().float().reshape(-1, 33), rtol=2e-2, atol=2e-1)
    dx = dy @ W.detach()
    assert ((x.grad.float() - dx).norm() / dx.norm()) < 2**-8  # by the rounded weight


def test_none_is_used_where_single_precision_is_as_fast() -> None:
    assert not half.serves(torch.randn(2, 4, dtype=torch.bfloat16)), "on a CPU"
    assert not half.serves(torch.randn(2, 4, device="meta"))
