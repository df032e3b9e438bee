# SPDX-License-Identifier: Apache-2.0
"""Scalings, caching, casting, choosing targets, intruders: the helpers, and where they are imported from."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import graftlet
from graftlet import LoHaConfig, LoraConfig, get_peft_model
from graftlet.errors import ConfigError
from graftlet.helpers import (
    DoraCaching,
    KappaTuneSelector,
    check_if_peft_model,
    disable_input_dtype_casting,
    find_kappa_target_modules,
    rescale_adapter_scale,
    update_signature,
)
from graftlet.methods.variants import dora
from graftlet.testing.benches import BENCHES, layers, learning, perturb
from graftlet.tuners.lora.intruders import reduce_intruder_dimension
from graftlet.tuners.tuners_utils import replicate_layers
from tests.model.models import IDS, llama

PLACES = ["helpers", "tuners.lora", "tuners", "utils", "optimizers", "tuners.lora.intruders", "utils.loftq_utils"]


def lora(**values: Any) -> Any:
    model = get_peft_model(BENCHES["linear"].model(), LoraConfig(**{"r": 4, "target_modules": ["l"], **values})).eval()
    perturb(model)
    return model


X = BENCHES["linear"].example()


@pytest.mark.parametrize("place", PLACES)
def test_every_name_is_where_the_reference_has_it(place: str) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = importlib.import_module(f"graftlet.{place}"), importlib.import_module(f"peft.{place}")
    assert peft
    for name in ours.__all__:
        value = getattr(ours, name)
        if name in ("CordaConfig", "preprocess_corda", "WEIGHTS_NAME", "LoraFAOptimizer", "NoMatchingPeftModuleError"):
            continue
        assert hasattr(theirs, name), name
        if inspect.isfunction(value):
            mine, other = inspect.signature(value).parameters, inspect.signature(getattr(theirs, name)).parameters
            named = {k: v for k, v in other.items() if v.kind is not inspect.Parameter.VAR_KEYWORD}
            assert list(mine)[: len(named)] == list(named), name
            for key, parameter in named.items():
                if not callable(parameter.default):
                    assert mine[key].default == parameter.default, (name, key)


def test_a_place_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="graftlet.helpers"):
        importlib.import_module("graftlet.helpers").no_such_name  # noqa: B018


# scalings


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_scalings_turn_an_adapter_up_and_down(method: str) -> None:
    config = {"lora": LoraConfig, "loha": LoHaConfig}[method](r=2, target_modules=["l"])
    model = get_peft_model(BENCHES["linear"].model(), config).eval()
    perturb(model)
    (layer,) = layers(model).values()
    base, y, first = BENCHES["linear"].model()(*X), model(*X), layer.scaling["default"]
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(model(*X), base + 0.5 * (y - base))
    assert layer.scaling["default"] == first
    layer.set_scale("default", 3)
    torch.testing.assert_close(model(*X), base + 3 * (y - base), atol=1e-5, rtol=1e-4)
    layer.scale_layer(2)
    assert layer.scaling["default"] == pytest.approx(6 * first)
    layer.unscale_layer(3)
    assert layer.scaling["default"] == pytest.approx(2 * first)
    layer.unscale_layer()
    assert layer.scaling["default"] == first
    layer.set_scale("none", 3)


def test_scalings_are_restored_after_an_error_and_refused_where_there_are_none() -> None:
    model = lora()
    (layer,) = layers(model).values()
    with pytest.raises(ZeroDivisionError), rescale_adapter_scale(model, 7):
        raise ZeroDivisionError
    assert layer.scaling == {"default": 2.0}
    with pytest.raises(ConfigError, match="no adapter"), rescale_adapter_scale(nn.Linear(2, 2), 2):
        pass
    with pytest.raises(TypeError, match="a number"), rescale_adapter_scale(model, "2"):  # type: ignore[arg-type]
        pass


def test_input_casting_can_be_left_to_others() -> None:
    model = lora().double()
    (layer,) = layers(model).values()
    seen: list[torch.dtype] = []
    layer.lora_dropout.put("default", Watch(seen))
    layer.base_layer.float()
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(*X)
    model.l(*X)
    assert seen == [torch.float32, torch.float64]
    with disable_input_dtype_casting(model, active=False):
        model.l(*X)
    assert seen[-1] == torch.float64


class Watch(nn.Module):
    def __init__(self, seen: list[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.dtype)
        return x


# DoRA


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def count(name: str) -> None:
        real = getattr(dora, name)
        monkeypatch.setattr(dora, name, lambda *args: (calls.append(1), real(*args))[1])

    count("row_norm")
    count("row_norms")
    return calls


@pytest.mark.parametrize("bench", ["linear", "conv2", "embedding"])
def test_dora_norms_are_kept_until_something_changes(bench: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = BENCHES[bench]
    model = get_peft_model(made.model(), LoraConfig(r=4, use_dora=True, target_modules=["l"])).eval()
    perturb(model)
    x, y, calls = made.example(), model(*made.example()), counted(monkeypatch)
    with DoraCaching():
        for _ in range(3):
            torch.testing.assert_close(model(*x), y)
        with torch.inference_mode():
            torch.testing.assert_close(model(*x), y)
        assert len(calls) == 1
        with torch.no_grad():
            learning(model, "default")[0].mul_(1.5)
        changed = model(*x)
        assert len(calls) == 2
        model.train()
        model(*x)
        assert len(calls) == 3
        model.eval()
    torch.testing.assert_close(model(*x), changed)
    assert len(calls) == 4
    assert not DoraCaching.on


def test_dora_caching_can_be_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = lora(use_dora=True), counted(monkeypatch)
    DoraCaching()(enabled=True)
    try:
        with torch.inference_mode():
            model(*X)
        model(*X).sum().backward()
        assert len(calls) == 1
        model.merge_adapter()
        model.unmerge_adapter()
        merging = len(calls)
        model(*X)
        assert len(calls) == merging + 1  # since the weight was written
    finally:
        DoraCaching()(enabled=False)


# targets


def test_the_best_conditioned_layers_are_the_references() -> None:
    peft = pytest.importorskip("peft")
    helpers = importlib.import_module("peft.helpers")
    assert peft
    model = llama()
    for top_p in (0.2, 0.5):
        ours = find_kappa_target_modules(model, top_p=top_p, show_progress=False)
        assert ours == helpers.find_kappa_target_modules(model, top_p=top_p, show_progress=False)
    experts = BENCHES["experts"].model()
    suffixes = (".up", ".down")
    ours = find_kappa_target_modules(experts, 1.0, moe_param_suffixes=suffixes, show_progress=False)
    theirs = helpers.find_kappa_target_modules(experts, 1.0, moe_param_suffixes=suffixes, show_progress=False)
    assert ours == theirs
    assert ours["target_parameters"]
    selector, their_selector = KappaTuneSelector(model, show_progress=False), helpers.KappaTuneSelector(model)
    for values in ({"num_modules": 3}, {"threshold": 20.0}, {}):
        assert selector.get_best_targets(**values) == their_selector.get_best_targets(**values)
    assert KappaTuneSelector(model, 8, show_progress=False).get_best_targets() == [
        n for n in selector.get_best_targets() if "self_attn" in n
    ]
    with pytest.raises(ConfigError, match="top_p"):
        selector.get_best_targets(top_p=2)
    LoraConfig(**ours)  # type: ignore[arg-type]


def test_a_stack_can_be_replicated() -> None:
    model = llama()
    replicate_layers(model, [[0, 2], [1, 3]])
    assert len(model.model.layers) == 4
    assert model.model.layers[1].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
    assert model(IDS).logits.isfinite().all()


# intruders


def intruding(library: Any) -> Any:
    config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["l"])
    return library.get_peft_model(BENCHES["linear"].model(), config).eval()


def test_intruders_are_cut_as_by_the_reference() -> None:
    peft = pytest.importorskip("peft")
    theirs_module = importlib.import_module("peft.tuners.lora.intruders")
    ours, theirs = intruding(graftlet), intruding(peft)
    perturb(ours, by=0.8)
    theirs.load_state_dict(ours.state_dict())
    said: list[str] = []
    for epsilon in (0.7, 1.0, 0.01):
        name = f"cut-{epsilon}".replace(".", "")
        reduce_intruder_dimension(ours, new_adapter_name=name, threshold_epsilon=epsilon, logging_sink=said.append)
        theirs_module.reduce_intruder_dimension(
            theirs, new_adapter_name=name, threshold_epsilon=epsilon, logging_sink=None
        )
        assert ours.active_adapters == [name]
        torch.testing.assert_close(ours(*X), theirs(*X), atol=1e-5, rtol=1e-4)
    assert any("no intruders" in line for line in said)
    assert any(": 8 intruders" in line for line in said)


@pytest.mark.parametrize("bench", ["conv1d", "embedding", "conv2", "experts", "grouped"])
def test_intruders_are_cut_on_every_layer(bench: str) -> None:
    made = BENCHES[bench]
    model = get_peft_model(made.model(), LoraConfig(r=4, **made.targets)).eval()
    perturb(model, by=0.8)
    before = {k: h.change("default")[0] for k, h in layers(model).items()}
    reduce_intruder_dimension(model, threshold_epsilon=2.0, top_k=99, mitigation_lambda=1.0, logging_sink=None)
    for key, layer in layers(model).items():
        torch.testing.assert_close(layer.change("intruder_reduced")[0], before[key], atol=1e-4, rtol=1e-4)


def test_intruders_are_of_lora_alone() -> None:
    model = get_peft_model(BENCHES["linear"].model(), LoHaConfig(r=2, target_modules=["l"]))
    with pytest.raises(ValueError, match="LoRA is needed"):
        reduce_intruder_dimension(model)


# signatures


def test_a_model_takes_over_the_bases_signature(tmp_path: Any) -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    assert model(input_ids=IDS).logits.shape[:2] == IDS.shape
    assert model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False).shape == (2, 6)
    model.save_pretrained(tmp_path)
    assert check_if_peft_model(tmp_path)
    assert not check_if_peft_model(tmp_path / "none")
    with pytest.raises(ConfigError, match="allowed"):
        update_signature(model, "call")  # type: ignore[arg-type]
