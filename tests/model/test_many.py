# SPDX-License-Identifier: Apache-2.0
"""Many adapters in one model: threads, names, freezing, and rows of a batch that are computed together."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlet
from graftlet.core.layer import AdaptedLayer, Base
from graftlet.errors import AdapterNameError
from graftlet.testing.benches import layers, near, perturb
from graftlet.testing.laws import mergeable, weighted
from graftlet.testing.running import adapted, run, same, second
from tests.laws.cases import REBASED, Case
from tests.laws.test_laws import linear, representative, table

from .models import IDS, llama, load, logits, lora, save

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")

NAMES = ["default", "b", "c", "d"]


@pytest.fixture
def model() -> Any:
    made = graftlet.get_peft_model(llama(), lora(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    for rank, name in enumerate(NAMES[1:], 3):
        made.add_adapter(name, lora(r=rank, target_modules=["q_proj", "v_proj", "down_proj"]))
    for seed, name in enumerate(NAMES):
        perturb(made, name, seed)
    return made.eval()


def alone(model: Any) -> dict[str, Tensor]:
    """What each adapter gives when it is the active one, and what the base does."""
    found = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = logits(model)
    model.set_adapter("default")
    with model.disable_adapter():
        found["__base__"] = logits(model)
    return found


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run all at the same time; the first error of any is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(w,)) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "another one merged"])
def test_each_thread_has_its_own_adapter(model: Any, merged: bool) -> None:
    expected = alone(model)
    if merged:
        model.merge_adapter(["b"])

    def using(name: str) -> Callable[[], None]:
        def work() -> None:
            for _ in range(25):
                with model.using(name):
                    torch.testing.assert_close(logits(model), expected[name])

        return work

    def rows() -> None:
        for _ in range(25):
            mixed = logits(model, input_ids=IDS, adapter_names=["c", "__base__"])
            torch.testing.assert_close(mixed[0], expected["c"][0])
            torch.testing.assert_close(mixed[1], expected["__base__"][1])

    def disabled() -> None:
        for _ in range(25):
            with model.disable_adapter():
                torch.testing.assert_close(logits(model), expected["__base__"])

    in_threads([*(using(n) for n in NAMES), rows, disabled])
    if merged:
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected["default"])


def test_what_is_chosen_is_chosen_for_one_model_alone(model: Any) -> None:
    other = graftlet.get_peft_model(llama(), lora()).eval()
    perturb(other)
    y, expected = logits(other), alone(model)
    with model.disable_adapter(), other.using("default"):
        torch.testing.assert_close(logits(other), y)
        torch.testing.assert_close(logits(model), expected["__base__"])
        with model.using("c"):
            torch.testing.assert_close(logits(model), expected["c"])
        assert model.get_model_status().enabled is False
        assert other.get_model_status().enabled is True
    torch.testing.assert_close(logits(model), expected["default"])


def test_unknown_names_change_nothing(model: Any) -> None:
    for call in (
        lambda: model.using("x").__enter__(),
        lambda: model.rename_adapter("x", "y"),
        lambda: model.freeze_adapter("x"),
    ):
        with pytest.raises(AdapterNameError):
            call()
    with pytest.raises(AdapterNameError, match="exists"):
        model.rename_adapter("b", "c")


@table(quick=representative)
def test_using_is_as_if_it_were_active(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    model.set_adapter("other")
    expected = run(model, case)
    model.set_adapter("default")
    y = run(model, case)
    with model.using("other"):
        same(run(model, case), expected)
    same(run(model, case), y)
    if mergeable(case):
        model.merge_adapter()
        with model.using("other"):
            near(run(model, case), expected, torch.float32)


@table(quick=representative)
def test_a_renamed_adapter_is_the_same(case: Case, tmp_path: Any) -> None:
    model = adapted(case)
    second(model, case)
    y, before = run(model, case), {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}
    model.rename_adapter("default", "new")
    assert list(model.peft_config) == ["new", "other"]
    assert model.active_adapters == ["new"]
    same(run(model, case), y)
    after = {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}
    assert {k.replace("default", "new"): i for k, i in before.items()} == after
    model.set_adapter("other")
    model.set_adapter("new")
    same(run(model, case), y)
    if case.key not in REBASED:  # its base is that of both adapters
        model.save_pretrained(str(tmp_path), selected_adapters=["new"])
        again = graftlet.PeftModel.from_pretrained(case.bench.model(), tmp_path / "new", config=case.config()).eval()
        same(run(again, case), y)
    if mergeable(case):
        model.merge_adapter()
        model.rename_adapter("new", "third")
        near(run(model, case), y, torch.float32)
        model.unmerge_adapter()
    model.delete_adapter("third" if mergeable(case) else "new")
    assert list(model.peft_config) == ["other"]


def test_prompts_are_renamed_and_chosen_too(tmp_path: Any) -> None:
    config = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    model = graftlet.get_peft_model(llama(), graftlet.PromptTuningConfig(**config)).eval()
    model.add_adapter("b", graftlet.PromptTuningConfig(**config))
    y = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    torch.testing.assert_close(plain, logits(model.get_base_model()))
    model.rename_adapter("default", "a")
    assert (model.active_adapters, list(model.peft_config)) == (["a"], ["a", "b"])
    torch.testing.assert_close(logits(model), y)
    with model.using("b"):
        used = logits(model)
    model.set_adapter("b")
    torch.testing.assert_close(used, logits(model))
    assert not torch.allclose(used, y)


def test_freezing(model: Any) -> None:
    model.freeze_adapter("default")
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.unfreeze_adapter(["default", "c"])
    learns = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {"default", "c"}


def test_a_mixed_model_by_its_name(tmp_path: Any) -> None:
    model = graftlet.get_peft_model(llama(), lora(), mixed=True).eval()
    assert isinstance(model, graftlet.PeftMixedModel)
    model.add_adapter("hra", graftlet.HRAConfig(r=2, target_modules=["q_proj", "k_proj"]))
    perturb(model, "hra")
    perturb(model)
    model.set_adapter(["default", "hra"])
    y = logits(model)
    save(model, tmp_path)
    again = load(llama(), tmp_path)
    again.load_adapter(tmp_path / "hra", "hra")
    again.set_adapter(["default", "hra"])
    torch.testing.assert_close(logits(again), y)


# rows computed together


def test_rows_of_many_adapters_take_one_computation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(model)
    rows = ["c", "default", "__base__", "d", "c", "b"]
    ids = IDS.repeat(3, 1)
    monkeypatch.setattr(AdaptedLayer, "_run", lambda *a: pytest.fail("a group was run by itself"))
    y = logits(model, input_ids=ids, adapter_names=rows)
    torch.testing.assert_close(y, torch.stack([expected[name][i % 2] for i, name in enumerate(rows)]))
    rows = ["c", "default", "d", "d", "c", "b"]
    y = logits(model, input_ids=ids, adapter_names=rows)
    torch.testing.assert_close(y, torch.stack([expected[name][i % 2] for i, name in enumerate(rows)]))


@table(quick=linear, only=lambda c: weighted(c) and c.bench.name in ("linear", "conv1d", "no-bias"))
def test_together_is_as_one_by_one(case: Case) -> None:
    """For every method that can: what it adds for several adapters at once is what each adds by itself."""
    model = adapted(case)
    second(model, case)
    model.eval()
    ((_, layer),) = layers(model).items()
    method = layer.methods["default"]
    (x,) = case.bench.example()
    views = [layer.view("default"), layer.view("other")]
    owner = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        base = Base(layer, pure=True)
        whole, bias = base(x), base.bias()
        group = method.grouped(views, base)
        if group is None:
            assert method.factored(views[0]) is None or method.delta_bias(views[0]) is not None
            return
        y = whole + group.added(x, owner, lambda: whole if bias is None else whole - bias)
        each = [method.forward(p, x, base) for p in views]
    near(y, torch.stack([each[n][i] for i, n in enumerate(owner.tolist())]), torch.float32)


def steps(work: Callable[[], Any]) -> int:
    """How many functions are called: what can be promised of a time."""
    count = 0

    def count_calls(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(count_calls)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_second_adapter_costs_what_the_thirtieth_does(model: Any) -> None:
    def add(name: str) -> int:
        return steps(lambda: model.add_adapter(name, lora(target_modules=["q_proj", "v_proj", "down_proj"])))

    add("warm")
    early = add("early")
    for i in range(24):
        add(f"x{i}")
    assert add("late") <= early * 1.1


def test_each_layer_more_costs_few_steps(model: Any) -> None:
    def add(*targets: str) -> int:
        return steps(lambda: model.add_adapter("".join(targets), lora(target_modules=list(targets))))

    add("v_proj")
    few, many = add("q_proj"), add("q_proj", "down_proj")
    blocks = len(model.get_base_model().model.layers)
    assert 0 < many - few <= 250 * blocks


def test_switching_sees_what_was_changed_by_hand(model: Any) -> None:
    """The walk over a model's modules is remembered, but not past a change of them."""
    model.set_adapter("b")
    model.set_adapter("default")
    blocks = model.get_base_model().model.layers
    kept = model.tuner.__dict__["_standing"]
    model.set_adapter("b")
    assert model.tuner.__dict__["_standing"] is kept
    copied = copy.deepcopy(blocks[0])
    blocks.append(copied)  # layers with adapters, put in by hand
    q = copied.self_attn.q_proj
    q.lora_A["c"].weight = torch.nn.Parameter(q.lora_A["c"].weight.detach().clone(), requires_grad=False)
    model.set_adapter("c")
    assert q.active_adapters == ["c"]
    assert [q.lora_A[n].weight.requires_grad for n in ("b", "c")] == [False, True]
    del blocks[-1]
    gone = weakref.ref(copied.self_attn.q_proj)
    del copied, q
    gc.collect()
    assert gone() is None, "what left the model is kept alive"
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made.set_adapter("d")
        found = list(layers(made.get_base_model()).values())
        assert all(h.active_adapters == ["d"] for h in found)
        assert {n.rsplit(".", 2)[1] for n, p in made.named_parameters() if p.requires_grad} == {"d"}
    assert model.active_adapters == ["c"]
    assert {n.rsplit(".", 2)[1] for n, p in model.named_parameters() if p.requires_grad} == {"c"}


def test_an_adapter_of_some_layers_is_renamed(model: Any) -> None:
    model.add_adapter("few", lora(r=2, target_modules=["q_proj"]))
    perturb(model, "few", 7)
    model.set_adapter("few")
    before = logits(model)
    model.rename_adapter("few", "some")
    assert torch.equal(logits(model), before)
    assert model.active_adapters == ["some"]
    model.set_adapter("b")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".some" in n)
    model.set_adapter("some")
    assert any(p.requires_grad for n, p in model.named_parameters() if ".some" in n)


ROWS = ["c", "default", "__base__", "d", "c", "b"]


def mixed(model: Any) -> Tensor:
    return logits(model, input_ids=IDS.repeat(3, 1), adapter_names=[r if r in model.peft_config else "b" for r in ROWS])


def by_rows(model: Any) -> Tensor:
    """The same from a copy, which has nothing at hand, with gradients on, when nothing is kept."""
    rows = [r if r in model.peft_config else "b" for r in ROWS]
    return copy.deepcopy(model)(input_ids=IDS.repeat(3, 1), adapter_names=rows).logits.detach()


def _in_place(model: Any) -> None:
    with torch.no_grad():
        for layer in layers(model.get_base_model()).values():
            layer.lora_B["c"].weight.mul_(-1.5)


def _other_data(model: Any) -> None:
    for layer in layers(model.get_base_model()).values():
        layer.lora_A["d"].weight.data = layer.lora_A["d"].weight.data * 2


def _rounded(model: Any) -> None:
    model.half()
    model.float()


def _other_weights(model: Any) -> None:
    state = {k: t * 1.25 if ".b." in k else t for k, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _base(model: Any) -> None:
    with torch.no_grad():
        for layer in layers(model.get_base_model()).values():
            layer.base_layer.weight.add_(0.1)


def _scaled(model: Any) -> None:
    for layer in layers(model.get_base_model()).values():
        layer.set_scale("c", 3.0)


def _renamed(model: Any) -> None:
    model.rename_adapter("c", "x")
    model.rename_adapter("d", "c")
    model.rename_adapter("x", "d")


def _deleted(model: Any) -> None:
    config = copy.deepcopy(model.peft_config["c"])
    model.delete_adapter("c")
    model.add_adapter("c", config)
    perturb(model, "c", 17)


def _learning(model: Any) -> None:
    model.set_adapter("b")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    model.zero_grad()


def _loaded(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["b"])
        model.delete_adapter("d")
        model.load_adapter(f"{folder}/b", "d")


def _merged(model: Any) -> None:
    model.merge_adapter(["b"])


CHANGES = [
    _in_place,
    _other_data,
    _rounded,
    _other_weights,
    _base,
    _scaled,
    _renamed,
    _deleted,
    _learning,
    _loaded,
    _merged,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_group_that_is_kept_is_never_stale(kind: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    model = graftlet.get_peft_model(llama(), lora(r=2, target_modules=targets, use_dora=kind == "dora"))
    for rank, name in enumerate(NAMES[1:], 3):
        model.add_adapter(name, lora(r=rank, target_modules=targets, use_dora=kind == "dora"))
    for seed, name in enumerate(NAMES):
        perturb(model, name, seed)
    model.eval()
    before = mixed(model)
    torch.testing.assert_close(before, by_rows(model))
    with monkeypatch.context() as patched:
        patched.setattr(AdaptedLayer, "view", lambda *a: pytest.fail("it was made again"))
        assert torch.equal(mixed(model), before)
    change(model)
    after = mixed(model)
    torch.testing.assert_close(after, by_rows(model))
    assert change is _merged or not torch.allclose(after, before, rtol=1e-5, atol=1e-6)


def test_only_the_last_group_is_kept(model: Any) -> None:
    mixed(model)
    layer = next(iter(layers(model.get_base_model()).values()))
    held = weakref.ref(layer._groups._held.made.A)
    logits(model, input_ids=IDS, adapter_names=["b", "c"])
    assert held() is None
    held = weakref.ref(layer._groups._held.made.A)
    model.delete_adapter("c")
    assert held() is None
