# SPDX-License-Identifier: Apache-2.0
"""aLoRA: from the last invocation in a row on, in every way that a model is run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlet
from graftlet.core.context import current
from graftlet.errors import CallError, CallWarning, ConfigError, MergeError
from graftlet.model.prompted import CACHES
from graftlet.testing.benches import perturb
from tests.model.models import llama, load, lora, save, silent

INVOCATION = [7, 8]
IDS = torch.tensor(
    [[1, 7, 8, 3, 4, 5, 6, 9], [7, 8, 1, 2, 7, 8, 5, 3], [1, 2, 3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 5, 3, 7, 8]]
)
OFFSETS = [7, 4, None, 2]
TARGETS = ["q_proj", "v_proj", "up_proj"]


def config(lib: Any = graftlet, **values: Any) -> Any:
    values = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "alora_invocation_tokens": INVOCATION, **values}
    return lora(lib, **values)


@pytest.fixture
def model() -> Any:
    made = graftlet.get_peft_model(llama(), config())
    perturb(made, by=0.5)
    return made.eval()


def twin(model: Any) -> Any:
    """The same tensors as an ordinary LoRA."""
    made = graftlet.get_peft_model(llama(), config(alora_invocation_tokens=None))
    made.load_state_dict(model.state_dict())
    return made.eval()


@torch.no_grad()
def logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    return model(*args, **kwargs).logits


@torch.no_grad()
def generated(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **kwargs}
    return model.generate(input_ids=ids, **options)


def cached(output: Any) -> tuple[str, Any]:
    """An output's cache, and what this version of transformers calls it."""
    return next((name, output[name]) for name in CACHES if name in output)


def unaided(model: Any, ids: Tensor, offsets: list[int | None], steps: int = 6) -> Tensor:
    """Greedy decoding by hand: every step a call with all tokens, told where the invocation is."""
    for step in range(steps):
        given = [None if o is None else o + step for o in offsets]
        ids = torch.cat([ids, logits(model, input_ids=ids, alora_offsets=given)[:, -1:].argmax(-1)], 1)
    return ids


def test_a_row_is_the_bases_before_its_invocation_and_from_there_the_adapters(model: Any) -> None:
    """Up to the invocation the base's logits; a row that is invoked from its start on is LoRA's as a whole."""
    y, base = logits(model, input_ids=IDS), logits(llama(), input_ids=IDS)
    for row, offset in enumerate(OFFSETS):
        start = IDS.shape[1] - (offset or 0)
        torch.testing.assert_close(y[row, :start], base[row, :start])
        assert offset is None or not torch.isclose(y[row, start:], base[row, start:], atol=1e-3).all(-1).any()
    whole = IDS[1:2, :4]
    torch.testing.assert_close(logits(model, input_ids=whole), logits(twin(model), input_ids=whole))


def test_ids_may_be_positional_and_offsets_may_be_given(model: Any) -> None:
    y = logits(model, input_ids=IDS)
    torch.testing.assert_close(logits(model, IDS), y)
    torch.testing.assert_close(logits(model, input_ids=IDS, alora_offsets=OFFSETS), y)
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(logits(model, inputs_embeds=embeds, alora_offsets=OFFSETS), y)
    with pytest.warns(CallWarning, match="input_ids"):
        torch.testing.assert_close(logits(model, inputs_embeds=embeds), logits(llama(), input_ids=IDS))
    with pytest.raises(CallError, match="rows"):
        logits(model, input_ids=IDS, alora_offsets=[1, 2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, side: str) -> None:
    pad = torch.zeros(4, 3, dtype=torch.int64)
    parts = [pad, IDS] if side == "left" else [IDS, pad]
    ids = torch.cat(parts, 1)
    mask = torch.cat([torch.zeros_like(t) if t is pad else torch.ones_like(t) for t in parts], 1)
    places = (mask.cumsum(1) - 1).clamp(0)
    y = logits(model, input_ids=ids, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(y[mask.bool()], logits(model, input_ids=IDS)[torch.ones_like(IDS).bool()])


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str
)
def test_generation_goes_on_from_the_prompts_invocation(model: Any, options: dict[str, Any]) -> None:
    assert torch.equal(generated(model, IDS, **options), unaided(model, IDS, OFFSETS))
    assert not torch.equal(generated(model, IDS), generated(llama(), IDS))


def test_generation_with_left_padding(model: Any) -> None:
    pad = torch.zeros(4, 2, dtype=torch.int64)
    mask = torch.cat([pad, torch.ones_like(IDS)], 1)
    y = generated(model, torch.cat([pad, IDS], 1), attention_mask=mask)
    assert torch.equal(y[:, 2:], generated(model, IDS))


def test_beams_are_those_of_each_row_alone(model: Any) -> None:
    together = generated(model, IDS, num_beams=3)
    for row in range(len(IDS)):
        assert torch.equal(together[row : row + 1], generated(model, IDS[row : row + 1], num_beams=3))


def test_a_cache_carries_the_invocation_to_later_calls(model: Any) -> None:
    """Steps by hand: the invocation is in an earlier call, whose cache is gone on with (also in a copy)."""
    y = logits(model, input_ids=IDS)
    with torch.no_grad():
        name, cache = cached(model(input_ids=IDS[:3, :6], use_cache=True))
        for given in (copy.deepcopy(cache), cache):
            torch.testing.assert_close(model(input_ids=IDS[:3, 6:], **{name: given}).logits, y[:3, 6:])


def test_a_cache_of_the_base_can_be_gone_on_with(model: Any) -> None:
    row = IDS[3:4]
    with torch.no_grad():
        name, prefix = cached(llama()(input_ids=row[:, :6], use_cache=True))
        y = generated(model, row, **{name: prefix})
    assert torch.equal(y, generated(model, row))


def test_rows_of_several_adapters(model: Any) -> None:
    model.add_adapter("plain", config(alora_invocation_tokens=None))
    model.add_adapter("other", config(alora_invocation_tokens=[5]))
    for name in ("plain", "other"):
        perturb(model, name, by=0.5, seed=len(name))
    names = ["default", "other", "__base__", "plain"]
    y, tokens = logits(model, input_ids=IDS, adapter_names=names), generated(model, IDS, adapter_names=names)
    for row, name in enumerate(names):
        alone = IDS[row : row + 1]
        if name == "__base__":
            torch.testing.assert_close(y[row : row + 1], logits(llama(), input_ids=alone))
            continue
        model.set_adapter(name)
        torch.testing.assert_close(y[row : row + 1], logits(model, input_ids=alone))
        assert torch.equal(tokens[row : row + 1], generated(model, alone))


def test_two_active_adapters_each_have_their_own_invocation(model: Any) -> None:
    model.add_adapter("other", config(alora_invocation_tokens=[4, 5]))
    perturb(model, "other", by=0.5)
    model.set_adapter(["default", "other"])
    y = logits(model, input_ids=IDS[2:3])
    model.set_adapter("other")
    torch.testing.assert_close(y, logits(model, input_ids=IDS[2:3]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_gradient_checkpointing(model: Any, reentrant: bool) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients()
    assert all(g.any() for g in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


def test_rows_without_the_invocation_teach_nothing(model: Any) -> None:
    model.train()(input_ids=IDS[2:3], labels=IDS[2:3]).loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_it_cannot_be_merged(model: Any) -> None:
    with pytest.raises(MergeError, match="invocation"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"alora_invocation_tokens": []},
        {"alora_invocation_tokens": [-1]},
        {"task_type": "SEQ_2_SEQ_LM"},
        {"target_parameters": ["x"]},
        {"arrow_config": graftlet.ArrowConfig()},
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused_by_the_config(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(**values)


def test_its_numbers_and_files_are_the_references(model: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    save(model, tmp_path / "ours")
    theirs = load(llama(), tmp_path / "ours", peft)
    torch.testing.assert_close(logits(theirs, input_ids=IDS), logits(model, input_ids=IDS))
    assert torch.equal(generated(theirs, IDS), generated(model, IDS))
    save(theirs, tmp_path / "theirs")
    torch.testing.assert_close(logits(load(llama(), tmp_path / "theirs"), input_ids=IDS), logits(model, input_ids=IDS))
    with silent(), pytest.raises(AssertionError):  # without a cache, the reference lets the invocation slip out
        assert torch.equal(generated(theirs, IDS, use_cache=False), generated(theirs, IDS))


# a model with no wrapper around it


@pytest.fixture
def injected() -> Any:
    """The fixture's adapter, in a bare model."""
    made: Any = graftlet.inject_adapter_in_model(config(), llama())
    perturb(made, by=0.5)
    return made.eval()


def test_a_bare_models_calls_say_where_it_begins(model: Any, injected: Any) -> None:
    y = logits(model, input_ids=IDS)
    assert not torch.allclose(y, logits(llama(), input_ids=IDS), atol=1e-3)
    for again in (injected, copy.deepcopy(injected), pickle.loads(pickle.dumps(injected))):
        with silent():
            assert torch.equal(logits(again, input_ids=IDS), y)
            assert torch.equal(logits(again, IDS), y)
            assert torch.equal(logits(again, input_ids=IDS, alora_offsets=OFFSETS), y)
    with pytest.warns(CallWarning, match="input_ids"):
        unseen = logits(injected, inputs_embeds=injected.get_input_embeddings()(IDS))
    torch.testing.assert_close(unseen, logits(llama(), input_ids=IDS))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_a_bare_model_generates(model: Any, injected: Any, options: dict[str, Any]) -> None:
    assert torch.equal(generated(injected, IDS, **options), generated(model, IDS, **options))


def test_a_bare_model_learns_with_gradient_checkpointing(model: Any, injected: Any) -> None:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    injected.gradient_checkpointing_enable()
    injected.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n.replace("base_model.model.", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    learning = {n: p.grad for n, p in injected.named_parameters() if n in grads}
    assert learning.keys() == grads.keys()
    for name, grad in learning.items():
        torch.testing.assert_close(grad, grads[name], msg=name)


@pytest.mark.slow
def test_a_compiled_bare_model_acts_the_same(injected: Any) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(injected, backend="eager")
    torch.testing.assert_close(logits(compiled, input_ids=IDS), logits(injected, input_ids=IDS))
    assert current() is None
    plain: Any = graftlet.inject_adapter_in_model(config(alora_invocation_tokens=None), llama())
    perturb(plain.eval(), by=0.5)
    torch._dynamo.reset()
    whole: Any = torch.compile(plain, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(whole, input_ids=IDS), logits(plain, input_ids=IDS))


def test_a_bare_models_failed_call_leaves_nothing_behind(injected: Any) -> None:
    y = logits(injected, input_ids=IDS)
    for wrong in ({"input_ids": IDS, "alora_offsets": [1, 2]}, {"input_ids": IDS + 10**6}):
        with pytest.raises((CallError, IndexError)):
            injected(**wrong)
        assert current() is None
    assert torch.equal(logits(injected, input_ids=IDS), y)
    refused = llama()
    with pytest.raises(graftlet.NoMatchingPeftModuleError):
        graftlet.inject_adapter_in_model(config(target_modules=["nothing"]), refused)
    assert not refused._forward_hooks
    assert not refused._forward_pre_hooks
