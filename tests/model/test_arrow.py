# SPDX-License-Identifier: Apache-2.0
"""Arrow: tokens routed among saved adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlet
from graftlet.errors import AdapterFileError, CallError, CallWarning, ConfigError, MergeError
from graftlet.methods.variants.arrow import direction
from graftlet.testing.benches import perturb
from tests.model.models import IDS, facts, llama, logits, lora, same, save, silent

TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: Any) -> list[str]:
    """Five saved adapters, each with a direction that stands out."""
    folder = tmp_path_factory.mktemp("experts")
    for i in range(5):
        model = graftlet.get_peft_model(llama(), lora(lora_alpha=2 + i, target_modules=TARGETS))
        perturb(model, by=0.3, seed=i)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    tensor[:, 0] *= 8
        save(model, folder / str(i))
    return [str(folder / str(i)) for i in range(5)]


def made(paths: list[str], lib: Any = graftlet, general: list[str] | None = None, **values: Any) -> Any:
    config = lib.ArrowConfig(**{"top_k": 2, "rng_seed": 0, **values})
    with silent():
        return lib.create_arrow_model(llama(), paths, config, general).eval()


def test_a_direction_is_the_top_right_singular_vector() -> None:
    A, B = torch.randn(3, 9), torch.randn(7, 3)
    v = direction(A, B)
    torch.testing.assert_close((v @ torch.linalg.svd(B @ A).Vh[0]).abs(), torch.tensor(1.0))
    assert not direction(A, torch.zeros(7, 3)).any()


def test_one_expert_is_that_adapter(paths: list[str]) -> None:
    alone = graftlet.PeftModel.from_pretrained(llama(), paths[0]).eval()
    torch.testing.assert_close(logits(made(paths[:1])), logits(alone))


def test_the_update_is_the_formulas(paths: list[str]) -> None:
    model = made(paths[:3], router_temperature=0.5)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 4, 8)
    expected = layer.base_layer(x)
    views = [layer.view(f"task_{i}") for i in range(3)]
    match = torch.stack([(x @ torch.linalg.svd(v.lora_B @ v.lora_A).Vh[0]).abs() for v in views], -1)
    for row in range(2):
        for token in range(4):
            best = match[row, token].argsort(descending=True)[:2]
            share = (match[row, token, best] / 0.5).softmax(0)
            for e, c in zip(best.tolist(), share, strict=True):
                expected[row, token] += c * views[e].scaling * views[e].lora_B @ views[e].lora_A @ x[row, token]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("values", [{}, {"top_k": 1}, {"router_temperature": 0.3}, {"use_gks": True}], ids=str)
def test_outputs_are_the_references(paths: list[str], values: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    general = paths[3:] if values.get("use_gks") else None
    ours, theirs = made(paths[:3], general=general, **values), made(paths[:3], peft, general, **values)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-4, rtol=2e-4)


def test_subtracting_the_general_leaves_the_experts_as_they_are(paths: list[str]) -> None:
    model = made(paths[:3], general=paths[3:], use_gks=True)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    y = logits(model)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert not torch.allclose(y, logits(made(paths[:3])), atol=1e-3)


def test_what_changes_in_an_expert_is_seen(paths: list[str]) -> None:
    model = made(paths[:3])
    logits(model)
    perturb(model, "task_1", by=1.0)
    fresh = made(paths[:3])
    perturb(fresh, "task_1", by=1.0)
    torch.testing.assert_close(logits(model), logits(fresh))


def test_an_expert_that_comes_later_is_routed_to(paths: list[str]) -> None:
    model = made(paths[:2], top_k=3)
    model.load_adapter(paths[2], "late")
    torch.testing.assert_close(logits(model), logits(made(paths[:3], top_k=3)))
    model.delete_adapter("late")
    torch.testing.assert_close(logits(model), logits(made(paths[:2])))


def test_it_generates_and_is_copied(paths: list[str]) -> None:
    model = made(paths[:3])
    tokens = [m.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for m in (model, copy.deepcopy(model))]
    assert torch.equal(*tokens)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(tokens[0], model.generate(input_ids=IDS, use_cache=False, **options))


def test_a_batch_of_the_router_and_others(paths: list[str]) -> None:
    model = made(paths[:3])
    routed = logits(model)
    model.set_adapter("task_1")
    alone = logits(model)
    y = logits(model, input_ids=IDS, adapter_names=["arrow_router", "task_1"])
    torch.testing.assert_close(y, torch.stack([routed[0], alone[1]]))


def test_it_compiles(paths: list[str]) -> None:
    model = made(paths[:2])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x: Tensor = torch.randn(2, 4, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_it_cannot_be_merged(paths: list[str]) -> None:
    with pytest.raises(MergeError, match="token"):
        made(paths[:2]).merge_adapter()


def test_a_router_alone_says_what_is_missing() -> None:
    model = graftlet.get_peft_model(llama(), lora(arrow_config=graftlet.ArrowConfig()))
    with pytest.raises(CallError, match="experts"):
        logits(model)


@pytest.mark.parametrize("case", ["rank", "layers", "variant", "embedding", "missing", "none", "no general"])
def test_what_cannot_be_routed_leaves_the_model_as_it_was(paths: list[str], case: str, tmp_path: Path) -> None:
    base, other, config = llama(), tmp_path / "other", graftlet.ArrowConfig()
    odd: dict[str, dict[str, Any]] = {
        "rank": {"r": 3}, "layers": {"target_modules": ["q_proj"]}, "variant": {"use_dora": True},
        "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    }  # fmt: skip
    if case in odd:
        with silent():
            save(graftlet.get_peft_model(llama(), lora(**{"target_modules": TARGETS, **odd[case]})), other)
    config.use_gks = case == "no general"
    before = facts(base)
    given = [] if case == "none" else [paths[0], str(other)] if case != "no general" else paths[:2]
    with silent(), pytest.raises((ConfigError, AdapterFileError)):
        graftlet.create_arrow_model(base, given, config)
    assert same(before, base)


def test_general_adapters_without_use_gks_are_told_of(paths: list[str]) -> None:
    with pytest.warns(CallWarning, match="use_gks"):
        graftlet.create_arrow_model(llama(), paths[:2], graftlet.ArrowConfig(), paths[3:])
