# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens, and weights that the input embedding and the output head share."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import graftlet
from graftlet.errors import ConfigError, NoMatchingPeftModuleError, TieWarning
from tests.model.models import IDS, adapted, learning, llama, load, logits, lora, move, save, silent, t5

peft = pytest.importorskip("peft")

TOKENS: dict[str, dict[str, Any]] = {
    "rows": {"trainable_token_indices": [1, 2]},
    "rows-by-name": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "rows-alike": {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    "rows-unlike": {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 3]}},
    "rows-of-head": {"trainable_token_indices": {"lm_head": [1, 2]}},
}
LAYERS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "save-embedding": {"modules_to_save": ["embed_tokens"]},
    "save-head": {"modules_to_save": ["lm_head"]},
    "save-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
TOGETHER = {f"{name}-together": {**kw, "ensure_weight_tying": True} for name, kw in LAYERS.items()}
CASES = {**TOKENS, **LAYERS, **TOGETHER}


def config(case: str, lib: Any = graftlet) -> Any:
    return lora(lib, init_lora_weights=False, **CASES[case])


def keys(lib: Any, model: Any) -> tuple[set[str], set[str]]:
    with silent():
        return set(model.state_dict()), set(lib.get_peft_model_state_dict(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_keys_and_files_are_the_references(case: str, tied: bool, tmp_path: Path) -> None:
    theirs = adapted(llama(tie_word_embeddings=tied), config(case, peft), peft)
    ours = adapted(llama(tie_word_embeddings=tied), config(case))
    in_memory, on_disk = keys(graftlet, ours)
    assert in_memory == keys(peft, theirs)[0]
    # the reference leaves out the unchanged base where a tied head alone is named; it is there in any other case
    assert on_disk == keys(peft, theirs)[1] or (case == "head-together" and tied)
    move(ours)
    move(theirs)
    save(ours, tmp_path / "ours")
    save(theirs, tmp_path / "theirs")
    again = load(llama(tie_word_embeddings=tied), tmp_path / "ours", peft)
    torch.testing.assert_close(logits(again), logits(ours))
    again = load(llama(tie_word_embeddings=tied), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(theirs))
    again = load(llama(tie_word_embeddings=tied), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_merged_is_unmerged(case: str, tied: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=tied)
    plain = logits(base)
    model = adapted(base, config(case))
    move(model)
    wanted, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert logits(model).equal(plain)
    model.unmerge_adapter()
    assert all(before[k].equal(v) for k, v in model.state_dict().items())
    with model.disable_adapter():
        assert logits(model).equal(plain)
    with silent():
        merged: Any = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    embedding, head = merged.model.embed_tokens.weight, merged.lm_head.weight
    assert merged.config.tie_word_embeddings == embedding.equal(head) == (embedding is head)
    with silent():
        merged.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_tied_stays_tied_when_merged() -> None:
    for case in [*TOGETHER, "rows", "rows-by-name", "rows-alike"]:
        model = adapted(llama(tie_word_embeddings=True), config(case))
        move(model)
        merged: Any = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight, case


def test_a_tied_head_learns_through_the_embedding_alone() -> None:
    model = adapted(llama(tie_word_embeddings=True), config("embedding-together"))
    assert {n for n in learning(model) if "lm_head" in n} == set()
    embedding = model.base_model.model.model.embed_tokens
    factor = embedding.lora_embedding_A["default"]
    model(input_ids=IDS, labels=IDS).loss.backward()
    losses = []
    for step in (1e-2, -2e-2):
        with torch.no_grad():
            factor[0, 7] += step
            losses.append(model(input_ids=IDS, labels=IDS).loss.item())
    slope = (losses[0] - losses[1]) / 2e-2
    torch.testing.assert_close(factor.grad[0, 7].item(), slope, rtol=2e-2, atol=1e-3)


def test_a_second_adapter_is_tied_as_well(tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), config("embedding-together"))
    model.add_adapter("other", lora(target_modules=["lm_head"], ensure_weight_tying=True, init_lora_weights=False))
    model.set_adapter("other")
    assert "base_model.model.lm_head.lora_A.other.weight" in model.state_dict()
    save(model, tmp_path)
    again = load(llama(tie_word_embeddings=True), tmp_path / "other")
    assert logits(again).equal(logits(model))
    model.delete_adapter("other")
    assert not [k for k in model.state_dict() if ".other." in k]


def test_two_adapters_train_rows_of_their_own(tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), config("rows"))
    model.add_adapter("other", lora(trainable_token_indices=[3], init_lora_weights=False))
    model.set_adapter("other")
    move(model, 1.0)
    wanted = logits(model)
    mixed = model(IDS, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(mixed[0], wanted[0])
    model.set_adapter("default")
    torch.testing.assert_close(mixed[1], logits(model)[1])
    save(model, tmp_path)
    assert logits(load(llama(tie_word_embeddings=True), tmp_path / "other")).equal(wanted)
    model.set_adapter(["default", "other"])
    together = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.add_adapter("third", lora(trainable_token_indices=[1]))
    with pytest.raises(ConfigError, match="tokens 1"):
        model.set_adapter(["default", "third"])


@pytest.mark.parametrize("case", ["rows", "embedding-together", "save-embedding-together"])
def test_copies_are_whole(case: str) -> None:
    model = adapted(llama(tie_word_embeddings=True), config(case))
    move(model)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert logits(twin).equal(wanted)
        move(twin, 1.0)
        assert not logits(twin).equal(wanted)
        assert logits(model).equal(wanted)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert logits(model).equal(wanted)


def test_a_tie_that_nothing_is_done_about_is_told() -> None:
    for case in LAYERS:
        with pytest.warns(TieWarning, match="share one weight"):
            graftlet.get_peft_model(llama(tie_word_embeddings=True), config(case))
    with pytest.warns(TieWarning, match="no layers of the model share one"):
        graftlet.get_peft_model(llama(), config("embedding-together"))
    with pytest.warns(TieWarning, match="none of them|no adapted layer"):
        graftlet.get_peft_model(llama(tie_word_embeddings=True), lora(ensure_weight_tying=True))
    for case in TOKENS:
        if case not in ("rows-unlike", "rows-of-head"):
            graftlet.get_peft_model(llama(tie_word_embeddings=True), config(case))  # no warning


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"trainable_token_indices": [11]}, ConfigError, r"resize_token_embeddings\(12\)"),
        ({"trainable_token_indices": [-1]}, ConfigError, "0 or more"),
        ({"trainable_token_indices": {"embed_token": [1]}}, NoMatchingPeftModuleError, "embed_tokens"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, ConfigError, "do not go together"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, ConfigError, "do not go together"),
    ],
)
def test_rows_that_cannot_be(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        graftlet.get_peft_model(llama(), lora(**values))


def test_rows_without_any_other_target(tmp_path: Path) -> None:
    model = adapted(llama(), lora(target_modules=[], trainable_token_indices=[1]))
    assert learning(model) == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
    move(model, 1.0)
    save(model, tmp_path)
    assert logits(load(llama(), tmp_path)).equal(logits(model))


def test_an_encoder_and_a_decoder_share_with_the_head(tmp_path: Path) -> None:
    """T5 has one weight in four places: the reference adapts one of them, which is never called."""
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    for values in ({"target_modules": ["shared"]}, {"modules_to_save": ["shared"], "target_modules": ["q"]}):
        model = adapted(t5(), lora(**values, ensure_weight_tying=True, init_lora_weights=False))
        move(model)
        wanted = logits(model, **inputs)
        assert not wanted.equal(logits(t5(), **inputs))
        save(model, tmp_path)
        assert logits(load(t5(), tmp_path), **inputs).equal(wanted)
        merged: Any = model.merge_and_unload()
        torch.testing.assert_close(logits(merged, **inputs), wanted, rtol=1e-4, atol=1e-5)
        assert merged.lm_head.weight is merged.shared.weight is merged.decoder.embed_tokens.weight


def test_a_module_in_two_places_is_adapted_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

    base, x = Twice(), torch.randn(2, 4)
    plain = base(x)
    model = adapted(base, lora(target_modules=["first"], init_lora_weights=False))
    assert base.first is base.second
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)
    assert base.first is base.second
    assert isinstance(base.first, nn.Linear)
    assert not wanted.equal(plain)
