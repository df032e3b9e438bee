# SPDX-License-Identifier: Apache-2.0
"""Adapters on every smaller back end's layers: what is read, computed, learned, mixed, merged or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.core.layer import AdaptedLayer
from graftlet.errors import MergeError
from graftlet.testing.benches import layers, perturb
from graftlet.weights.site import Linear, Site, site_of
from graftlet.weights.storage import PLAIN

from .formats import FORMATS, GROUP, IN, OUT, Format

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(params=FORMATS, ids=str)
def form(request: pytest.FixtureRequest) -> Format:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def called(form: Format) -> Format:
    if form.call is None:
        pytest.skip("this layer's kernel is not to be had on a CPU")
    return form


@pytest.fixture
def refusing(called: Format) -> Format:
    if called.writes:
        pytest.skip("this layer can be written")
    return called


class Alone(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.l = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


def only(adapted: nn.Module) -> AdaptedLayer:
    (layer,) = layers(adapted).values()
    return layer


def lora(**other: object) -> graftlet.LoraConfig:
    return graftlet.LoraConfig(r=4, target_modules=["l"], **other)


def site_for(layer: nn.Module) -> Site:
    site = site_of(layer)
    assert site is not None
    return site


def inputs(site: Site, rows: int = 5) -> Tensor:
    return torch.randn(rows, IN).to(site.dtype)


def apart(found: Tensor, meant: Tensor) -> float:
    """How far off, relative to the largest number that is meant."""
    return float((found.float() - meant.float()).abs().max() / meant.float().abs().max())


def test_it_is_a_linear_layer_of_its_shape(form: Format) -> None:
    site = site_for(form.make(nn.Linear(IN, OUT)))
    assert isinstance(site, Linear)
    assert site.storage is not PLAIN
    assert site.storage.backend
    assert (site.shape, site.has_bias, site.device.type) == ((OUT, IN), True, "cpu")
    assert site.dtype.is_floating_point
    assert site.dtype.itemsize >= 2


def test_what_is_read_is_the_weight_that_was_quantised(form: Format) -> None:
    plain = nn.Linear(IN, OUT)
    W, b = site_for(form.make(plain)).read()
    assert W.shape == (OUT, IN)
    assert b is not None
    assert float((W.float() - plain.weight).norm() / plain.weight.norm()) <= form.rounding
    assert apart(b, plain.bias) < 0.01


def test_what_is_read_is_what_the_layer_computes_with(called: Format) -> None:
    layer = called.make(nn.Linear(IN, OUT))
    site = site_for(layer)
    W, b = site.read()
    assert b is not None
    x = inputs(site)
    assert apart(layer(x), nn.functional.linear(x.float(), W.float(), b.float())) <= called.call  # type: ignore[operator]
    assert site.read_bias() is not None  # reading left it there


def test_a_weight_is_written_or_refused(form: Format) -> None:
    site = site_for(form.make(nn.Linear(IN, OUT)))
    before, meant = site.read()[0].clone(), torch.randn(OUT, IN) / 5
    if not form.writes:
        with pytest.raises(MergeError, match="cannot be written: .*dequantize=True"):
            site.write(meant, None)
        assert torch.equal(site.read()[0], before)
        return
    saved = site.save()
    site.write(meant, None)
    assert float((site.read()[0].float() - meant).norm() / meant.norm()) <= form.rounding
    assert torch.equal(site.original(saved)[0], before)
    site.restore(saved)
    assert torch.equal(site.read()[0], before)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_learns_on_it(called: Format, use_dora: bool) -> None:
    model = Alone(called.make(nn.Linear(IN, OUT)))
    x = inputs(site_for(model.l))
    base = model(x).detach()
    adapted = graftlet.get_peft_model(model, lora(use_dora=use_dora))
    assert apart(adapted(x), base) <= (0 if not use_dora else max(2e-3, called.call or 0))
    learning = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learning.values()} == {torch.float32}
    optimiser = torch.optim.SGD(learning.values(), 0.05)
    losses = []
    for _ in range(4):
        loss = (adapted(x).float() - base.float() - 1).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), base)


def test_its_output_is_the_base_and_the_change(called: Format) -> None:
    model = Alone(called.make(nn.Linear(IN, OUT)))
    x = inputs(site_for(model.l))
    base = model(x).detach()
    adapted = graftlet.get_peft_model(model, lora())
    perturb(adapted)
    change = only(adapted).get_delta_weight("default")
    assert apart(adapted(x).float() - base.float(), x.float() @ change.T.float()) < 0.02


def test_a_gradient_goes_through_it_to_what_is_before(called: Format) -> None:
    model = nn.Sequential(nn.Linear(IN, IN), called.make(nn.Linear(IN, OUT)))
    site = site_for(model[1])
    model[0].to(site.dtype)
    if called.back is not None:
        pytest.skip(called.back)
    config = graftlet.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    adapted = graftlet.get_peft_model(model.train(), config)  # autoawq has gradients in training alone
    x = inputs(site)
    adapted(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_rows_of_several_adapters(called: Format) -> None:
    model = Alone(called.make(nn.Linear(IN, OUT)))
    adapted = graftlet.get_peft_model(model, lora())
    adapted.add_adapter("dora", lora(use_dora=True))
    perturb(adapted)
    adapted.eval()
    x = inputs(site_for(only(adapted).base_layer), 3)
    mixed = adapted(x, adapter_names=["dora", "__base__", "default"])
    for row, name in enumerate(["dora", None, "default"]):
        if name is None:
            with adapted.disable_adapter():
                single = adapted(x[row : row + 1])
        else:
            adapted.set_adapter(name)
            single = adapted(x[row : row + 1])
        assert apart(mixed[row], single[0]) <= 0.01


def test_merging_keeps_the_adapted_weight_and_unmerging_the_bits(form: Format) -> None:
    if not form.writes:
        pytest.skip("this layer cannot be written")
    adapted = graftlet.get_peft_model(Alone(form.make(nn.Linear(IN, OUT))), lora())
    perturb(adapted)
    host = only(adapted)
    before, meant = host.site.read()[0].clone(), host.merged_weight(["default"])[0]
    adapted.merge_adapter()
    merged = host.site.read()[0]
    assert float((merged.float() - meant).norm() / meant.norm()) <= form.rounding
    assert float((merged.float() - meant).norm()) < float((before.float() - meant).norm())  # the change is in it
    adapted.unmerge_adapter()
    assert torch.equal(host.site.read()[0], before)


def test_a_refused_merge_says_why_and_changes_nothing(refusing: Format) -> None:
    model = Alone(refusing.make(nn.Linear(IN, OUT)))
    adapted = graftlet.get_peft_model(model, lora())
    perturb(adapted)
    x = inputs(only(adapted).site)
    y = adapted(x)
    with pytest.raises(MergeError, match="cannot be written: .*dequantize=True"):
        adapted.merge_adapter()
    assert torch.equal(adapted(x), y)


def test_merging_into_an_ordinary_layer_loses_nothing(called: Format) -> None:
    adapted = graftlet.get_peft_model(Alone(called.make(nn.Linear(IN, OUT))), lora())
    perturb(adapted)
    host = only(adapted)
    x, meant = inputs(host.site), host.merged_weight(["default"])[0]
    y = adapted(x)
    merged: Any = adapted.merge_and_unload(dequantize=True)
    assert type(merged.l) is nn.Linear
    assert apart(merged.l.weight, meant) <= 2 * torch.finfo(merged.l.weight.dtype).eps
    assert apart(merged(x.to(merged.l.weight.dtype)), y) <= max(0.01, called.call or 0)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "brain"])
def test_qalora_moves_the_zeros_of_hqq_and_rounds_nothing(bits: int, dtype: torch.dtype) -> None:
    pytest.importorskip("hqq")
    from .formats import hqq

    torch.manual_seed(0)
    model = Alone(hqq(bits, dtype=dtype)(nn.Linear(IN, OUT)))
    config = lora(use_qalora=True, qalora_group_size=GROUP, init_lora_weights=False)
    adapted = graftlet.get_peft_model(model, config)
    layer = only(adapted).base_layer
    codes, scale = layer.W_q.clone(), layer.meta["scale"].clone()
    x = inputs(site_for(layer))
    y = adapted(x)
    adapted.merge_adapter()
    assert torch.equal(layer.W_q, codes)
    assert torch.equal(layer.meta["scale"], scale)
    assert apart(adapted(x), y) < (1e-5 if dtype == torch.float32 else 0.02)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(x), y)
