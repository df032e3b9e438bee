# SPDX-License-Identifier: Apache-2.0
"""Adapters on quantised layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftlet
from graftlet.errors import MergeError, RoundingWarning
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
    read = {k: h.site.read()[0].clone() for k, h in layers(adapted.get_base_model()).items()}
    before = adapted(x)
    for _ in range(3):
        with pytest.warns(RoundingWarning):
            adapted.merge_adapter()
        assert not torch.equal(adapted(x), before)
        adapted.unmerge_adapter()
        for key, host in layers(adapted.get_base_model()).items():
            assert torch.equal(host.site.read()[0], read[key])
    assert torch.equal(adapted(x), before)


def test_a_merge_says_what_it_lost(model: nn.Module) -> None:
    x = torch.randn(7, 128)
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first", "second"]))
    perturb(adapted)
    assert graftlet.merge_errors(adapted) == {}
    meant = {k: h.merged_weight(["default"])[0] for k, h in layers(adapted.get_base_model()).items()}
    with pytest.warns(RoundingWarning, match=r"2 quantised layers .* Worst is '(first|second)'"):
        adapted.merge_adapter()
    errors = graftlet.merge_errors(adapted)
    assert errors.keys() == {"first", "second"}
    for (key, host), error in zip(layers(adapted.get_base_model()).items(), errors.values(), strict=True):
        off = host.site.read()[0] - meant[key]
        assert error.weight == pytest.approx(float(off.norm() / meant[key].norm()))
        assert 0 < error.weight < error.change
    adapted.unmerge_adapter()
    assert graftlet.merge_errors(adapted) == {}
    with pytest.warns(RoundingWarning):
        bare = adapted.merge_and_unload()
    assert graftlet.merge_errors(bare) == errors
    assert bare(x).isfinite().all()


def test_merged_dequantised_nothing_is_lost(model: nn.Module) -> None:
    x = torch.randn(7, 128)
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["second"]))
    perturb(adapted)
    W = layers(adapted.get_base_model())["second"].merged_weight(["default"])[0]
    kept = layers(adapted.get_base_model())["second"].site.dtype
    bare = adapted.merge_and_unload(dequantize=True)
    assert [type(m) for m in bare.children()] == [nn.Linear] * 2
    assert [type(p) for p in bare.parameters()] == [nn.Parameter] * 4
    assert torch.equal(bare.second.weight, W.to(kept))
    assert bare(x.to(kept)).isfinite().all()
    assert graftlet.merge_errors(bare) == {}


def test_a_rounded_merge_is_taken_back_before_it_is_made_dense(model: nn.Module) -> None:
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first", "second"]))
    perturb(adapted)
    W = layers(adapted.get_base_model())["second"].merged_weight(["default"])[0]
    kept = layers(adapted.get_base_model())["second"].site.dtype
    with pytest.warns(RoundingWarning):
        adapted.merge_adapter()
    assert torch.equal(adapted.merge_and_unload(dequantize=True).second.weight, W.to(kept))


def test_a_merge_that_does_not_take_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a back end's tensor takes what is written, and does nothing with it."""
    x = torch.randn(7, 128)
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first", "second"]))
    perturb(adapted)
    before = adapted(x)
    monkeypatch.setattr(type(layers(adapted.get_base_model())["second"].site.storage), "write", lambda *_: None)
    with pytest.raises(MergeError, match="did not take the merged weight"):
        adapted.merge_adapter()
    assert torch.equal(adapted(x), before)
    assert graftlet.merge_errors(adapted) == {}


def test_what_cannot_be_made_dense_leaves_all_as_it_is(model: nn.Module) -> None:
    x = torch.randn(7, 128)
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first", "second"]))
    perturb(adapted)
    with torch.no_grad():
        layers(adapted.get_base_model())["second"].lora_B["default"].weight[0, 0] = torch.nan
    before, kinds = adapted(x), [type(h.base_layer) for h in layers(adapted.get_base_model()).values()]
    with pytest.raises(MergeError, match="NaN"):
        adapted.merge_and_unload(dequantize=True)
    assert torch.equal(adapted(x), before) or before.isnan().any()
    assert [type(h.base_layer) for h in layers(adapted.get_base_model()).values()] == kinds
    assert [type(h.site.module) for h in layers(adapted.get_base_model()).values()] == kinds


def test_a_layers_status_names_its_back_end(model: nn.Module) -> None:
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["first"]))
    (layer,) = graftlet.get_layer_status(adapted)
    assert layer.quantization_backend in ("bnb 4bit", "bnb 8bit", "torchao", "quanto")
