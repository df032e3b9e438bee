# SPDX-License-Identifier: Apache-2.0
"""What is kept of one adapter in inference gives what the long way gives, and forgets itself when anything has changed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.core import settled
from graftlet.core.kernel import kernels
from graftlet.core.layer import AdaptedLayer

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
}


class Small(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def built(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32, learns: bool = False) -> Any:
    torch.manual_seed(0)
    config = graftlet.LoraConfig(r=4, target_modules=["lin"], init_lora_weights=False, **KINDS[kind])
    model = graftlet.get_peft_model(Small(bias).to(dtype), config).eval()
    return model if learns else model.requires_grad_(False)


def layer_of(model: Any) -> AdaptedLayer:
    return model.base_model.model.lin


def kept(model: Any) -> Any:
    """What the layer keeps, after a call."""
    held = layer_of(model)._lone._held
    return None if held is None else held.made


def by_weight(model: Any, x: Tensor) -> Tensor:
    W, b = layer_of(model).effective()
    return nn.functional.linear(x, W, b)


def off(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def frozen(model: Any) -> Any:
    """As for serving: nothing learns, and the layer knows of it."""
    layer_of(model).set_adapter("default", inference_mode=True)
    return model


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_weight(kind: str, bias: bool, dtype: torch.dtype, learns: bool) -> None:
    model = built(kind, bias, dtype, learns)
    model = model if learns else frozen(model)
    exact = built(kind, bias, learns=learns)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    with torch.no_grad():
        for shape in ((24,), (5, 24), (2, 3, 24), (0, 24)):
            x = torch.randn(shape).to(dtype)
            y = model(x)
            assert y.dtype == dtype
            assert y.shape == (*shape[:-1], 40)
            if x.numel():
                assert off(y, by_weight(exact, x.float())) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert (kept(model) is None) == (learns and kind == "dora")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_changes_is_seen(kind: str) -> None:
    model, x = frozen(built(kind)), torch.randn(3, 24)
    layer = layer_of(model)
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.clone()

    def write(of: nn.Module) -> None:
        of.weight.copy_(torch.randn_like(of.weight))  # type: ignore[operator, arg-type]

    changes = [
        lambda: write(layer.lora_A["default"]),
        lambda: write(layer.lora_B["default"]),
        lambda: write(layer.base_layer),
        lambda: layer.scale_layer(0.5),
        lambda: setattr(layer.base_layer, "bias", nn.Parameter(torch.randn(40))),
        lambda: layer.lora_A["default"]._parameters.update(weight=nn.Parameter(torch.randn(4, 24))),
        lambda: model.double().float(),
    ]
    with torch.no_grad():
        last = model(x)
        for change in changes:
            change()
            assert off(model(x), by_weight(model, x)) < 1e-6
        assert off(model(x), last) > 0.1


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("learns", [False, True])
def test_wide_inputs_have_the_update_before_the_product(
    kind: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled, "WIDE", 1)
    for dtype, bias in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        model, x = built(kind, bias, dtype, learns), torch.randn(2, 3, 24, dtype=dtype)
        model = model if learns else frozen(model)
        calls: list[int] = []
        before = nn.Linear.forward
        with monkeypatch.context() as at, torch.no_grad():
            at.setattr(nn.Linear, "forward", lambda own, x, at=calls, before=before: (at.append(1), before(own, x))[1])
            y = model(x)
            assert len(calls) == (kind == "dora" and not learns)  # a gain is of the layer's own output
            assert off(y, by_weight(model, x)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_what_an_optimiser_writes_without_a_trace_is_seen_while_the_adapter_learns() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = built("lora", dtype=dtype, learns=True), torch.randn(3, 24, dtype=dtype)
        with torch.no_grad():
            before = model(x)
            layer_of(model).lora_B["default"].weight.data.add_(0.5)
            assert off(model(x), before) > 0.1
            assert off(model(x), by_weight(model, x)) < 1e-2


def test_others_who_look_at_the_layer_have_their_way() -> None:
    model, x, seen = frozen(built("dropout")), torch.randn(3, 24), []
    layer = layer_of(model)
    with torch.no_grad():
        y = model(x)
        handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
        assert model(x).allclose(y, atol=1e-6)
        assert off(seen[0], layer.base_layer(x)) == 0
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert torch.func.vmap(model)(x).allclose(y, atol=1e-6)
        layer.lora_dropout["default"].train()
        assert not model(x).allclose(y)
        layer.lora_dropout["default"].eval()
        assert model(x).allclose(y, atol=1e-6)
        model.merge_adapter()
        assert model(x).allclose(y, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert off(model(x), layer.base_layer(x)) == 0


def test_it_is_for_inference_alone_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built("lora"), torch.randn(3, 24)
    model(x.requires_grad_()).sum().backward()
    assert kept(model) is None
    assert x.grad is not None
    monkeypatch.setenv("GRAFTLET_KERNELS", "0")
    kernels.cache_clear()
    try:
        with torch.no_grad():
            model(x)
        assert kept(model) is None
    finally:
        kernels.cache_clear()
        monkeypatch.undo()


def test_nothing_is_held_of_tensors_that_have_gone_elsewhere() -> None:
    model = frozen(built("lora"))
    with torch.no_grad():
        model(torch.randn(3, 24))
    assert kept(model) is not None
    model.to(torch.bfloat16)
    assert kept(model) is None
