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
from graftlet.testing.running import adapted, seeded
from tests.laws.cases import cases

LINEAR = [c for c in cases() if c.bench.name == "linear" and not c.call]


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Kernels off, or on as they are where half precision is fast, on whatever device the test runs."""

    def choose(plain: bool) -> None:
        monkeypatch.setenv(kernel.SWITCH, "0" if plain else "1")
        kernel.kernels.cache_clear()

    def serves(x: Tensor) -> bool:
        return x.dtype in half.HALVES and not torch.is_autocast_enabled(x.device.type)

    monkeypatch.setattr(half, "serves", serves)
    yield choose
    monkeypatch.undo()
    kernel.kernels.cache_clear()


def outcome(case: Case) -> dict[str, Tensor]:
    """The output and all gradients, in single precision."""
    model = adapted(case, torch.bfloat16)
    (x,) = case.bench.example(torch.bfloat16)
    x.requires_grad_()
    with seeded(6):
        y = model(x)
        y.float().square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().float() for n, t in {"y": y, "x": x.grad, **found}.items() if t is not None}


@pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_an_adapter_is_the_plain_one(case: Case, plainly: Callable[[bool], None]) -> None:
    plainly(True)
    wanted = outcome(case)
    plainly(False)
    found = outcome(case)
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
    assert torch.allclose(x.grad.float(), dy @ W.detach(), rtol=2e-2, atol=2e-1)


def test_none_is_used_where_single_precision_is_as_fast() -> None:
    assert not half.serves(torch.randn(2, 4, dtype=torch.bfloat16)), "on a CPU"
    assert not half.serves(torch.randn(2, 4, device="meta"))
