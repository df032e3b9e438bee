# SPDX-License-Identifier: Apache-2.0
"""What kernels for any method are compared by: every method on a linear layer, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftlet.core import kernel
from graftlet.testing.case import Case
from graftlet.testing.running import adapted, seeded
from tests.laws.cases import cases

LINEAR = [c for c in cases() if c.bench.name == "linear" and not c.call]


def turn(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """Kernels on or off. Whoever does so clears `kernel.kernels` once the environment is back."""
    monkeypatch.setenv(kernel.SWITCH, "1" if on else "0")
    kernel.kernels.cache_clear()


def outcome(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and all gradients, in single precision, of a model in a dtype."""
    model = adapted(case, dtype)
    (x,) = case.bench.example(dtype)
    x.requires_grad_()
    with seeded(6):
        y = model(x)
        y.float().square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().float() for n, t in {"y": y, "x": x.grad, **found}.items() if t is not None}
