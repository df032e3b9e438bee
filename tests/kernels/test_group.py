# SPDX-License-Identifier: Apache-2.0
"""Rows with adapters of their own: the products summed into the layer's output give what each row's own factors give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlet.core.group import Group
from graftlet.weights.product import Product

IN, OUT, RANK, ADAPTERS = 24, 40, 3, 4
SHAPES = [(6, IN), (6, 1, IN), (6, 5, IN), (6, 2, 3, IN)]


def group(adapters: int = ADAPTERS) -> Group:
    return Group(torch.randn(adapters, RANK, IN), torch.randn(adapters, OUT, RANK))


def expected(made: Group, x: Tensor, owner: Tensor, plain: Tensor) -> Tensor:
    """Row by row, in double precision."""
    rows = [row.double() @ made.A[i].double().t() @ made.B[i].double().t() for row, i in zip(x, owner, strict=True)]
    return plain.double() + torch.stack(rows)


def off(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("how", ["product", "read anew", "no product", "wide output"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_adapter(dtype: torch.dtype, bias: bool, how: str) -> None:
    torch.manual_seed(0)
    W, b = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype) if bias else None
    calls: list[int] = []

    def whole(x: Tensor) -> Tensor:
        calls.append(x.dim())
        y = torch.nn.functional.linear(x, W, b)
        return y.double() if how == "wide output" else y

    products: dict[str, Callable[[], Product | None]] = {
        "product": lambda: Product(W, b, dtype),
        "read anew": lambda: Product(lambda: W, b, dtype),
    }
    for shape, count in itertools.product(SHAPES, (6, ADAPTERS)):
        made, x = group(count), torch.randn(shape).to(dtype)
        owner = torch.arange(6) if count == 6 else torch.tensor([3, 0, 0, 2, 1, 3])
        calls.clear()
        y = made.on(x, owner, whole, products.get(how, lambda: None))
        tokens = x.numel() > x.shape[0] * IN
        assert calls == ([] if how == "product" and tokens else [x.dim()])
        plain = torch.nn.functional.linear(x.double(), W.double(), None if b is None else b.double())
        assert y.shape == (*shape[:-1], OUT)
        assert off(y, expected(made, x, owner, plain)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_an_output_that_was_given_is_written_over_alone() -> None:
    torch.manual_seed(0)
    made, x, owner = group(), torch.randn(ADAPTERS, 5, IN), torch.arange(ADAPTERS)
    W, b = torch.randn(OUT, IN), torch.randn(OUT)
    before = x.clone(), W.clone(), b.clone()
    given = torch.nn.functional.linear(x, W, b)
    right = expected(made, x, owner, given)
    assert made.on(x, owner, lambda _: given, lambda: None) is given
    assert off(given, right) < 1e-6
    assert off(made.on(x, owner, lambda _: given, lambda: Product(W, b, x.dtype)), right) < 1e-6
    assert all(torch.equal(t, was) for t, was in zip((x, W, b), before, strict=True))


def test_it_is_for_inputs_in_half_precision_that_nobody_else_sees_to(monkeypatch: pytest.MonkeyPatch) -> None:
    made = group()

    def lean(dtype: torch.dtype, made: Group = made) -> bool:
        on_a_gpu: Any = SimpleNamespace(is_cuda=True, is_meta=False, dtype=dtype, device=torch.device("cuda"))
        return made.lean(on_a_gpu)

    with torch.no_grad():
        assert lean(torch.bfloat16)
        assert lean(torch.float16)
        assert not lean(torch.float32)
        assert not lean(torch.bfloat16, replace(made, gain=torch.ones(ADAPTERS, OUT)))
        assert not made.lean(torch.randn(4, IN, dtype=torch.bfloat16))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
        assert lean(torch.bfloat16)
        assert not lean(torch.float16)
    assert not lean(torch.bfloat16)
