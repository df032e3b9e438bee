# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: saved experts mixed by a classifier of the base's last hidden state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlet
from graftlet.errors import AdapterFileError, CallError, ConfigError, MergeError
from graftlet.testing.benches import perturb
from tests.model.models import IDS, facts, llama, load, logits, lora, move, same, save, silent

TARGETS = ["q_proj", "v_proj", "up_proj"]
NAMES = ("0", "1", "2")
PREFIX = "base_model.internal_xlora_classifier."


@pytest.fixture(scope="module")
def experts(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    for i, name in enumerate(NAMES):
        model = graftlet.get_peft_model(llama(), lora(lora_alpha=2 + i, target_modules=[*TARGETS, "embed_tokens"]))
        perturb(model, by=0.4, seed=i)
        save(model, folder / name)
    return {name: str(folder / name) for name in NAMES}


def config(experts: dict[str, str], lib: Any = graftlet, **values: Any) -> Any:
    values = {"hidden_size": 8, "xlora_depth": 3, "xlora_size": 6, "task_type": "CAUSAL_LM", **values}
    return lib.XLoraConfig(**{"adapters": experts, **values})


def made(experts: dict[str, str], lib: Any = graftlet, **values: Any) -> Any:
    with silent():
        return lib.get_peft_model(llama(use_cache=False), config(experts, lib, **values)).eval()


def trained(experts: dict[str, str], **values: Any) -> Any:
    model = made(experts, **values)
    perturb(model, by=0.5)
    return model


def classifier(model: Any) -> dict[str, Tensor]:
    held = model.state_dict().items()
    return {k.replace("classifier.default.", "classifier."): t for k, t in held if "xlora_classifier" in k}


SETTINGS: list[dict[str, Any]] = [
    {}, {"layerwise_scalings": True}, {"xlora_depth": 1}, {"enable_softmax": False}, {"softmax_temperature": 0.3},
    {"top_k_lora": 2}, {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    {"global_scaling_weight": 0.5}, {"scaling_pass_value": 0.7}, {"xlora_dropout_p": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_keys_and_outputs_are_the_references(experts: dict[str, str], values: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = trained(experts, **values), made(experts, peft, **values)
    mine = classifier(ours)
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in classifier(theirs).items()}
    theirs.load_state_dict(mine, strict=False)
    torch.testing.assert_close(logits(ours), logits(theirs))
    torch.testing.assert_close(ours.get_latest_scalings(), theirs.get_latest_scalings())
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)


def test_the_update_is_the_formulas(experts: dict[str, str]) -> None:
    """Shares from the base's last hidden state; each layer adds its experts' updates by them."""
    model = trained(experts, layerwise_scalings=True)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda m, x, y: seen.extend((x[0], y)))
    logits(model)
    x, y = seen[-2:]
    view = layer.view("default")
    hidden = llama()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    shares = layer.methods["default"].classify(view, hidden)[:, :, view.number]
    expected = layer.base_layer(x)
    for i, name in enumerate(NAMES):
        e = layer.view(name)
        expected = expected + shares[..., i, None] * (x @ e.lora_A.T @ e.lora_B.T) * e.scaling
    torch.testing.assert_close(y, expected)


def test_the_classifier_alone_learns_unless_the_experts_are_to(experts: dict[str, str]) -> None:
    for together in (False, True):
        model = trained(experts, use_trainable_adapters=together).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        taught = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert taught == {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("xlora_classifier" in n for n in taught)
        assert any("lora_A" in n for n in taught) == together


def test_checkpointed_training_gives_the_same_gradients(experts: dict[str, str]) -> None:
    model = trained(experts, xlora_dropout_p=0.0)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


def test_saved_and_loaded_it_is_equal(experts: dict[str, str], tmp_path: Any) -> None:
    """All of the classifier stands in the file; the reference reads it."""
    peft = pytest.importorskip("peft")
    model = trained(experts)
    save(model, tmp_path, selected_adapters=["default"])
    tensors = graftlet.load_peft_weights(tmp_path)
    assert set(tensors) == {f"{PREFIX}layers.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")}
    again = load(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(logits(load(llama(use_cache=False), tmp_path, peft)), logits(model))
    moved = {name: str(path) for name, path in experts.items()}
    torch.testing.assert_close(logits(load(llama(), tmp_path, adapters=moved)), logits(model))


def test_files_of_the_reference_lack_tensors_and_say_so(experts: dict[str, str], tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    save(made(experts, peft), tmp_path)
    base = llama()
    before = facts(base)
    with silent(), pytest.raises(AdapterFileError, match="missing"):
        graftlet.PeftModel.from_pretrained(base, tmp_path)
    assert same(before, base)
    model = load(llama(), tmp_path, strict=False)
    theirs = graftlet.load_peft_weights(tmp_path)
    held = classifier(model)
    assert theirs
    assert all(torch.equal(held[k], t) for k, t in theirs.items())


def test_generation_is_that_of_whole_calls(experts: dict[str, str]) -> None:
    model, ids = trained(experts), IDS
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for _ in range(4):
        ids = torch.cat([ids, logits(model, input_ids=ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, ids)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, num_beams=2)[:, :5], IDS)


def test_what_the_classifier_gives_can_be_looked_at_and_set(experts: dict[str, str]) -> None:
    model = trained(experts)
    assert model.get_latest_scalings() is None
    y = logits(model)
    assert not model.get_scalings_log()
    model.enable_scalings_logging()
    for count in (5, 3, 5):
        logits(model, input_ids=IDS[:, :count])
    model.disable_scalings_logging()
    logits(model)
    log = model.get_scalings_log()
    assert [s.shape for s in log] == [(2, n, 10, 3) for n in (5, 3, 5)]
    assert {n: places for n, (places, _) in model.get_bucketed_scalings_log().items()} == {5: [0, 2], 3: [1]}
    torch.testing.assert_close(log[0].sum(-1), torch.ones(2, 5, 10))
    model.clear_scalings_log()
    assert not model.get_scalings_log()
    model.set_topk_lora(1)
    assert not torch.allclose(logits(model), y)
    model.set_topk_lora(None)
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0
    torch.testing.assert_close(logits(model), logits(llama()))
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == pytest.approx(1 / 3)


def test_disabled_it_is_the_base_and_copied_it_is_equal(experts: dict[str, str]) -> None:
    model = trained(experts)
    y = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), y)
    move(copied)
    assert not torch.allclose(logits(copied), y)
    torch.testing.assert_close(logits(model), y)


def test_an_expert_alone_can_be_activated(experts: dict[str, str]) -> None:
    model = trained(experts)
    model.set_adapter("1")
    torch.testing.assert_close(logits(model), logits(load(llama(), experts["1"])))


def test_what_cannot_be_is_refused(experts: dict[str, str]) -> None:
    model = trained(experts)
    with pytest.raises(MergeError, match="token"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="beside"):
        model.set_adapter(["default", "0"])
    with pytest.raises(CallError, match="whole batch"):
        logits(model, input_ids=IDS, adapter_names=["default", "0"])
    with pytest.raises(CallError, match="PeftModel"):
        model.base_model.model(input_ids=IDS)
    with pytest.raises(CallError, match="cache"):
        logits(model, input_ids=IDS[:, :1], attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize(
    "values",
    [
        {"enable_softmax_topk": True}, {"xlora_depth": 0}, {"top_k_lora": 0}, {"softmax_temperature": 0.0},
        {"xlora_dropout_p": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_do_not_go_together_are_refused_by_the_config(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config({"0": "x"}, **values)


@pytest.mark.parametrize("case", ["missing", "none", "dora"])
def test_experts_that_cannot_be_had_leave_the_model_as_it_was(
    experts: dict[str, str], case: str, tmp_path: Any
) -> None:
    with silent():
        save(graftlet.get_peft_model(llama(), lora(use_dora=True)), tmp_path / "dora")
    given = {"0": experts["0"], "9": str(tmp_path / case)} if case != "none" else {}
    base = llama()
    before = facts(base)
    with silent(), pytest.raises((ConfigError, AdapterFileError)):
        graftlet.get_peft_model(base, config(given))
    assert same(before, base)
