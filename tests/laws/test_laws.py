# SPDX-License-Identifier: Apache-2.0
"""The laws that every registered method keeps, on every kind of layer it works on. Registering is enough to be tested."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlet import Call, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict, using
from graftlet.config import PeftConfig
from graftlet.core.layer import widened
from graftlet.errors import CallError, ConfigError, MergeError
from graftlet.model.peft_model import PeftModel
from graftlet.weights.site import Attention, Parameter

from .benches import BATCH, layers, learning, near, perturb, seeded, snapshot
from .cases import REBASED, UNNEUTRAL, Case, cases

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAMES = ["0", "weight", "keys", "lora_A", "ünïcode", "default", "forward", "training"]


def table(*, quick: Callable[[Case], bool] = lambda c: True, only: Callable[[Case], bool] = lambda c: True) -> Any:
    """The cases a law holds for; those that are not `quick` are marked slow."""
    rows = [pytest.param(c, id=str(c), marks=() if quick(c) else pytest.mark.slow) for c in cases() if only(c)]
    return pytest.mark.parametrize("case", rows)


def representative(case: Case) -> bool:
    """Plain settings on every common layer, and every setting on a linear one."""
    return (case.bench.common and case.first) or case.bench.name == "linear"


def linear(case: Case) -> bool:
    return case.bench.name == ("embedding" if case.entry.name == "TRAINABLE_TOKENS" else "linear") and case.first


def weighted(case: Case) -> bool:
    return not case.replaces


def mergeable(case: Case) -> bool:
    return case.merges


def same(a: Tensor, b: Tensor) -> None:
    """Assert that two runs of one computation agree; blocked kernels may differ in the last bit by where memory lies."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def adapted(case: Case, dtype: torch.dtype = SINGLE, name: str = "default", **changes: Any) -> PeftModel:
    """The case's model with one trained adapter."""
    model = fresh(case, dtype, name, **changes)
    perturb(model, name)
    return model


def fresh(case: Case, dtype: torch.dtype = SINGLE, name: str = "default", **changes: Any) -> PeftModel:
    with seeded(3):
        return get_peft_model(case.bench.model(dtype), case.config(**changes), name).eval()


def second(model: PeftModel, case: Case, name: str = "other") -> None:
    """Another trained adapter of the same method."""
    config = case.config(**({"token_indices": [0, 2]} if case.entry.name == "TRAINABLE_TOKENS" else {}))
    with seeded(4):
        model.add_adapter(name, config)
    perturb(model, name, seed=5)
    model.eval()


@torch.no_grad()
def run(model: torch.nn.Module, case: Case, dtype: torch.dtype = SINGLE, **kwargs: Any) -> Tensor:
    return model(*case.bench.example(dtype), **case.call, **kwargs)


def base_output(case: Case, dtype: torch.dtype = SINGLE) -> Tensor:
    return run(case.bench.model(dtype), case, dtype)


@torch.no_grad()
def by_weight(model: PeftModel, case: Case, weights: dict[str, tuple[Tensor, Tensor | None]]) -> Tensor:
    """The base model's output, in double precision, with these weights in place of its own."""
    bare = copy.deepcopy(model).unload().double()
    for key, (W, b) in weights.items():
        site = layers(model)[key].site
        owner = bare.get_submodule(
            key.removeprefix("base_model.model.").replace("base_layer.", "").removesuffix(".base_layer")
        )
        shape = getattr(owner, site.name).shape
        kept = site.kept(W).double()
        assert kept.shape == shape
        setattr(owner, site.name, torch.nn.Parameter(kept))
        if b is not None and site.bias is not None:
            setattr(owner, site.bias, torch.nn.Parameter(b.double()))
    return bare(*(x.double() if x.is_floating_point() else x for x in case.bench.example()))


# a new adapter


@table(quick=representative)
def test_a_new_adapter_changes_nothing(case: Case) -> None:
    if case.key in UNNEUTRAL or not case.entry.method.exact_start:
        pytest.skip("this start is not neutral")
    near(run(fresh(case), case), base_output(case), SINGLE)


@table(quick=representative)
def test_only_declared_tensors_get_gradients(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    model.train()
    with seeded(6):
        y = model(*case.bench.example(), **case.call)
        (y * torch.randn_like(y)).sum().backward()
    taught = {id(p) for p in learning(model, "default")}
    assert taught
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None
        assert reached == (id(parameter) in taught) == parameter.requires_grad, name
        assert not reached or parameter.grad.isfinite().all(), name
        assert not reached or parameter.grad.any(), f"{name} has a zero gradient"


# forward and merging


@table(quick=representative, only=lambda c: weighted(c) and mergeable(c))
def test_forward_is_the_operation_with_the_transformed_weight(case: Case) -> None:
    model = adapted(case)
    weights = {k: h.merged_weight(["default"]) for k, h in layers(model).items()}
    y = run(model, case)
    near(y, by_weight(model, case, weights), SINGLE)
    assert not torch.allclose(y, base_output(case), atol=1e-3), "the adapter does nothing"


@table(quick=representative, only=mergeable)
def test_merged_equals_forward_and_unmerging_restores_the_bits(case: Case) -> None:
    model = adapted(case)
    before, y = snapshot(model), run(model, case)
    model.merge_adapter()
    near(run(model, case), y, SINGLE)
    model.unmerge_adapter()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    same(run(model, case), y)


@table(quick=representative, only=mergeable)
def test_merging_for_good_leaves_a_bare_model(case: Case) -> None:
    model = adapted(case)
    y = run(model, case)
    bare = model.merge_and_unload()
    assert bare.state_dict().keys() == case.bench.model().state_dict().keys()
    near(run(bare, case), y, SINGLE)


@table(only=lambda c: not mergeable(c))
def test_what_has_no_merged_form_says_so(case: Case) -> None:
    model = adapted(case)
    before = snapshot(model)
    with pytest.raises(MergeError):
        model.merge_adapter()
    after = snapshot(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


@table(quick=representative)
def test_disabled_equals_the_base(case: Case) -> None:
    model = adapted(case)
    base = run(copy.deepcopy(model).unload(), case)
    if case.key not in REBASED:
        same(base, base_output(case))
    y = run(model, case)
    with model.disable_adapter():
        same(run(model, case), base)
    same(run(model, case), y)
    if mergeable(case):
        model.merge_adapter()
        with model.disable_adapter():
            near(run(model, case), base, SINGLE)


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=["bfloat16", "float16"])
@table(quick=lambda c: linear(c) or (c.first and c.bench.name in ("embedding", "conv2")))
def test_adapters_on_a_half_precision_base(case: Case, dtype: torch.dtype) -> None:
    """The adapter is kept in single precision; outputs have the base's dtype and its precision."""
    model = adapted(case, dtype)
    y = run(model, case, dtype)
    assert y.dtype == base_output(case, dtype).dtype
    if weighted(case):
        kinds = {t.dtype for t in learning(model, "default")}
        assert kinds == {SINGLE}
    if weighted(case) and mergeable(case):
        weights = {k: h.merged_weight(["default"]) for k, h in layers(model).items()}
        near(y, by_weight(model, case, weights), dtype)
        model.merge_adapter()
        near(run(model, case, dtype), y, dtype)


# several adapters


def law_of(model: PeftModel) -> str:
    return next(iter(layers(model).values())).methods["default"].law


@table(quick=representative, only=lambda c: weighted(c) and mergeable(c))
def test_two_active_adapters_follow_the_declared_law(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    law = law_of(model)
    if law == "one":
        with pytest.raises(ConfigError):
            model.set_adapter(["default", "other"])
        return
    expected = {}
    for key, layer in layers(model).items():
        W0, b0 = widened(*layer.site.read())
        one, two = (layer.methods[n] for n in ("default", "other"))
        p, q = layer.view("default"), layer.view("other")
        W1, b1 = one.apply(p, W0, b0)
        if law == "chain":
            expected[key] = two.apply(q, W1, b1)
        else:
            W2, b2 = two.apply(q, W0, b0)
            fit = layer.site.fit
            b = None if b1 is None or b2 is None else b1 + b2 - (0 if b0 is None else b0)
            expected[key] = W1 + W2 - fit(W0, W1), b
    model.set_adapter(["default", "other"])
    y = run(model, case)
    near(y, by_weight(model, case, expected), SINGLE, steps=16)
    model.merge_adapter()
    near(run(model, case), y, SINGLE, steps=16)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    near(run(model, case), y, SINGLE, steps=16)


@table(quick=representative)
def test_a_mixed_batch_gives_each_row_its_adapter(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    model.eval()
    rows = ["default", "__base__", "other", "default"]
    assert len(rows) == BATCH
    method = case.entry.method
    several = case.bench.kind is Attention if case.replaces else False  # a whole attention layer gives two tensors
    bare = case.bench.kind is Parameter and not case.replaces
    if several or bare or (not case.replaces and method.unmixable):
        with pytest.raises(CallError), using(Call(tuple(rows))):
            run(model, case)
        return
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = run(model, case)
    with model.disable_adapter():
        alone["__base__"] = run(model, case)
    with using(Call(tuple(rows))):
        y = run(model, case)
    expected = torch.stack([alone[name].select(case.bench.batch, i) for i, name in enumerate(rows)], case.bench.batch)
    near(y, expected, SINGLE)


@table(quick=lambda c: linear(c))
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_may_have_any_name(case: Case, name: str, tmp_path: Path) -> None:
    y = run(adapted(case), case)
    model = adapted(case, name=name)
    same(run(model, case), y)
    model.save_pretrained(str(tmp_path))
    folder = tmp_path if name == "default" else tmp_path / name
    again = PeftModel.from_pretrained(case.bench.model(), folder, name, config=case.config()).eval()
    same(run(again, case), y)
    model.delete_adapter(name)
    assert name not in model.peft_config


# copies and files


@table(quick=representative)
def test_saved_and_loaded_it_is_equal(case: Case, tmp_path: Path) -> None:
    model = adapted(case)
    y = run(model, case)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(case.bench.model(), tmp_path, config=case.config()).eval()
    same(run(again, case), y)
    assert not [n for n, p in again.named_parameters() if p.is_meta or p.requires_grad]
    again.train()
    if mergeable(case):
        again.eval().merge_adapter()
        near(run(again, case), y, SINGLE)


@table(quick=representative)
def test_its_tensors_move_to_another_model(case: Case) -> None:
    model = adapted(case)
    tensors = get_peft_model_state_dict(model)
    assert tensors
    other = fresh(case)
    perturb(other, seed=9)
    result = set_peft_model_state_dict(other, tensors)
    assert not result.missing_keys
    assert not result.unexpected_keys
    same(run(other, case), run(model, case))


@table(quick=linear)
def test_its_config_survives_json(case: Case, tmp_path: Path) -> None:
    config = case.config()
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    first, then = config.to_dict(), again.to_dict()
    assert {k: v for k, v in first.items() if k != "peft_version"} == {
        k: v for k, v in then.items() if k != "peft_version"
    }


@table(quick=representative)
def test_copied_and_pickled_it_is_equal(case: Case) -> None:
    model = adapted(case)
    y = run(model, case)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    for again in (copied, pickle.load(buffer)):
        same(run(again, case), y)
        perturb(again, seed=11)
        assert not torch.allclose(run(again, case), y)
    same(run(model, case), y)


@table(quick=representative)
def test_made_on_meta_it_has_no_memory_until_loaded(case: Case) -> None:
    y, tensors = run(adapted(case), case), get_peft_model_state_dict(adapted(case))
    model = PeftModel(case.bench.model(), case.config(), low_cpu_mem_usage=True, _init=False).eval()
    set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    model._loaded(["default"], model.peft_config["default"])
    assert not [n for n, t in model.state_dict().items() if t.is_meta]
    same(run(model, case), y)


# compilation


@table(quick=linear, only=lambda c: c.bench.name != "attention")
def test_it_compiles_without_a_graph_break(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    near(run(compiled, case), run(model, case), SINGLE)


@pytest.mark.slow
@table(only=linear)
def test_it_compiles_for_training(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    expected = gradients(model, model, case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, grad in gradients(compiled, model, case).items():
        near(grad, expected[name], SINGLE, steps=32)


def gradients(call: Any, model: PeftModel, case: Case) -> dict[str, Tensor]:
    model.zero_grad()
    call(*case.bench.example(), **case.call).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
