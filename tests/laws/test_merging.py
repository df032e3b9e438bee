# SPDX-License-Identifier: Apache-2.0
"""Merging and unmerging, for every registered method: the weights' very bits come back, and little is kept for that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.core.host import hosts
from graftlet.core.merging import Kept
from graftlet.errors import MergeError
from graftlet.model.peft_model import PeftModel
from graftlet.registry import entries
from graftlet.testing.benches import Around, layers, near, perturb, seeded, snapshot
from graftlet.testing.laws import mergeable
from graftlet.testing.running import BRAIN, HALF, SINGLE, adapted, run, second
from graftlet.weights import residual as residuals
from graftlet.weights.residual import residual

from .cases import SETTINGS, Case
from .test_laws import linear, representative, table

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.GraftletWarning")


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(bits(before[k]).equal(bits(after[k])) for k in before)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=["float32", "bfloat16", "float16"])
@table(quick=representative, only=mergeable)
def test_merging_in_any_order_gives_the_bits_back(case: Case, dtype: torch.dtype) -> None:
    model = adapted(case, dtype)
    second(model, case)
    before = snapshot(model)
    together = next((h for _, h in hosts(model)), None)
    several = case.replaces or together is None or together.methods["default"].law != "one"
    for names in itertools.permutations(["default", "other"]) if several else [["default"], ["other"]]:
        for name in names:
            model.merge_adapter([name])
        assert not unchanged(model, before)
        model.unmerge_adapter()
        assert unchanged(model, before)
    for _ in range(3):
        model.merge_adapter(["default"])
        model.unmerge_adapter()
    assert unchanged(model, before)


@table(quick=linear, only=lambda c: mergeable(c) and not c.replaces)
def test_an_adapter_that_changed_while_merged_gives_the_bits_or_a_word(case: Case) -> None:
    model = adapted(case)
    before = {path: layer.original()[0].clone() for path, layer in layers(model).items()}
    model.merge_adapter()
    merged = {path: layer.weight.clone() for path, layer in layers(model).items() if layer.site.name == "weight"}
    perturb(model, seed=12)
    try:
        model.unmerge_adapter()
    except MergeError:
        assert all(merged[path].equal(layer.weight) for path, layer in layers(model).items() if path in merged)
    else:
        assert all(before[path].equal(layer.original()[0]) for path, layer in layers(model).items())


@pytest.mark.parametrize("name", ["LORA", "IA3", "OFT", "ROAD", "VERA", "FOURIERFT"])
def test_a_small_adapter_may_change_while_merged(name: str) -> None:
    model, layer = usual(name, SINGLE)
    before = layer.weight.clone()
    model.merge_adapter()
    perturb(model, seed=12)
    model.unmerge_adapter()
    assert before.equal(layer.weight)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=["float32", "bfloat16", "float16"])
def test_a_thousand_cycles(dtype: torch.dtype) -> None:
    with seeded(0):
        model = graftlet.get_peft_model(
            Around(nn.Linear(24, 16)).to(dtype), graftlet.LoraConfig(r=4, target_modules=["l"])
        )
        model.add_adapter("other", graftlet.LoraConfig(r=2, target_modules=["l"]))
    perturb(model)
    perturb(model, "other")
    before = snapshot(model)
    for i in range(1000):
        model.merge_adapter(["default", "other"] if i % 2 else ["other"])
        model.unmerge_adapter()
    assert unchanged(model, before)


# what is kept


SMALLER = {"VBLORA": {"init_vector_bank_bound": 0.02}}
"""Settings of the usual proportions, where those of the laws make changes larger than the weights."""


def usual(name: str, dtype: torch.dtype, size: int = 256) -> tuple[PeftModel, nn.Linear]:
    """A method's adapter of the usual proportions on a layer of some size."""
    config = next(e for e in entries() if e.name == name).config
    values = {k: v for k, v in next(iter(SETTINGS.get(name, {"": {}}).values())).items() if k != "token_indices"}
    values |= SMALLER.get(name, {})
    with seeded(0):
        layer = nn.Linear(size, size)
        model = graftlet.get_peft_model(Around(layer).to(dtype), config(target_modules=["l"], **values)).eval()
        perturb(model, by=0.01)
    return model, layer


def kept(name: str, dtype: torch.dtype) -> float:
    """Bytes kept an element of a layer's weight."""
    model, layer = usual(name, dtype)
    before = snapshot(model)
    model.merge_adapter()
    ((_, host),) = layers(model).items()
    assert isinstance(host.kept, Kept)
    found = host.kept.nbytes / layer.weight.numel()
    model.unmerge_adapter()
    assert unchanged(model, before)
    return found


METHODS = [e.name for e in entries() if hasattr(e.method, "transform") and not e.method.unmergeable]


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "TRAINABLE_TOKENS"])
def test_at_most_a_byte_an_element_is_kept(name: str, dtype: torch.dtype) -> None:
    assert kept(name, dtype) <= 1


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=["float32", "bfloat16", "float16"])
def test_every_number_comes_back(dtype: torch.dtype) -> None:
    """Zeros of both signs, denormals, infinities; from estimates that are right, near, and far off."""
    tiny, top = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    odd = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 4, top, -top, float("inf"), -float("inf"), float("nan"), 1, -1])
    with seeded(0):
        tensor = torch.cat([odd, torch.randn(1003)]).to(dtype)
        for noise in (0, torch.finfo(dtype).eps, 0.1, 10):
            estimate = (tensor.float() + noise * torch.randn(tensor.shape)).to(dtype)
            held = residual(tensor, estimate)
            assert held is not None
            found = held.restored(estimate)
            assert found is not None
            assert bits(found).equal(bits(tensor))


@pytest.mark.parametrize("count", [1, 8, 127, 128, 129, 1003])
def test_bits_are_kept_step_by_step(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a tensor is beside a step, and whichever step is usual by the time it is brought back."""
    monkeypatch.setattr(residuals, "STEP", 128)
    with seeded(0):
        tensor = torch.randn(count)
        estimate = tensor * (1 + 1e-7 * torch.randn(count))
        estimate[::50] *= 3
    held = residual(tensor, estimate)
    monkeypatch.setattr(residuals, "STEP", 64)
    assert held is not None
    assert len(held.places) == len(estimate[::50])
    found = held.restored(estimate)
    assert found is not None
    assert found.equal(tensor)
    estimate[0] = 7 * estimate[0] + 1  # kept whole: the estimate does not matter
    estimate[-1:] *= 1.5 if (count - 1) % 50 else 1
    assert (held.restored(estimate) is None) == bool((count - 1) % 50)


def test_a_weight_that_was_changed_while_merged_is_told() -> None:
    with seeded(0):
        model = graftlet.get_peft_model(Around(nn.Linear(24, 16)), graftlet.LoraConfig(r=2, target_modules=["l"]))
    perturb(model)
    model.merge_adapter()
    with torch.no_grad():
        model.base_model.model.l.base_layer.weight.mul_(1.5)
    with pytest.raises(MergeError, match="changed"):
        model.unmerge_adapter()


# some of the active ones


@table(quick=linear, only=mergeable)
def test_merging_some_of_the_active_leaves_the_others_acting(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    ((_, host), *_) = hosts(model)
    if case.replaces or host.methods["default"].law == "one":
        pytest.skip("they cannot act together")
    model.set_adapter(["default", "other"])
    y = run(model, case)
    with model.disable_adapter():
        alone = run(model, case)  # not the base that it was, where an adapter has taken a part of it
    model.merge_adapter(["default"])
    near(run(model, case), y, SINGLE, steps=32)
    with model.disable_adapter():
        near(run(model, case), alone, SINGLE, steps=32)
    model.unmerge_adapter()
    near(run(model, case), y, SINGLE)


@table(quick=linear, only=mergeable)
def test_what_is_not_finite_leaves_the_whole_model_alone(case: Case) -> None:
    """The last layer's adapter is broken; the first one's weight is as it was all the same."""
    if case.bench.name not in ("linear", "embedding"):
        pytest.skip("two layers of one kind are needed")
    model = broken(case)
    before = snapshot(model)
    with pytest.raises(MergeError):
        model.merge_adapter()
    assert unchanged(model, before)
    assert not any(host.merged for _, host in hosts(model))


def broken(case: Case) -> PeftModel:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Around(case.bench.make()), Around(case.bench.make())

    with seeded(0):
        model = graftlet.get_peft_model(Two(), case.config()).eval()
    with torch.no_grad():
        learns: list[Any] = [p for n, p in model.named_parameters() if ".b." in n and "default" in n]
        learns = learns or [p for n, p in model.named_parameters() if "default" in n]
        for parameter in learns:
            parameter.fill_(float("nan"))
    return model
