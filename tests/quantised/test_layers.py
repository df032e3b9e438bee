# SPDX-License-Identifier: Apache-2.0
"""Adapters on quantised layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftlet
from graftlet.testing.benches import layers, perturb

from .backends import BACKENDS, Backend


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 96)
        self.second = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def quantised(backend: Backend) -> nn.Module:
    torch.manual_seed(0)
    model = Two()
    for name, layer in list(model.named_children()):
        setattr(model, name, backend.make(layer))
    return model


@pytest.fixture(params=BACKENDS, ids=str)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return quantised(request.param)


def test_lora_trains_on_it(model: nn.Module) -> None:
    x = torch.randn(7, 128)
    base = model(x).detach()
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first", "second"]))
    assert torch.equal(adapted(x), base)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert [p.dtype for p in learning] == [torch.float32] * 4
    optimiser = torch.optim.SGD(learning, 0.1)
    losses = []
    for _ in range(5):
        loss = (adapted(x) - 1).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), base)


def test_unmerging_restores_the_bits(model: nn.Module) -> None:
    x = torch.randn(7, 128)
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first", "second"]))
    perturb(adapted)
    read = {k: h.site.read()[0].clone() for k, h in layers(adapted).items()}
    before = adapted(x)
    for _ in range(3):
        adapted.merge_adapter()
        assert not torch.equal(adapted(x), before)
        adapted.unmerge_adapter()
        for key, host in layers(adapted).items():
            assert torch.equal(host.site.read()[0], read[key])
    assert torch.equal(adapted(x), before)
