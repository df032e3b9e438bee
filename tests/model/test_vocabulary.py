# SPDX-License-Identifier: Apache-2.0
"""Vocabularies that grew, and embeddings that are saved with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

import graftlet
from graftlet.errors import AdapterFileError, BaseMismatchWarning, EmbeddingWarning
from tests.model.models import adapted, learning, llama, load, logits, lora, move, save, silent

peft = pytest.importorskip("peft")

CASES: dict[str, dict[str, Any]] = {
    "layers": {},
    "embedding": {"target_modules": ["embed_tokens"]},
    "copy": {"modules_to_save": ["embed_tokens"]},
    "rows": {"trainable_token_indices": [12]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with silent():
        llama(tie_word_embeddings=request.param).save_pretrained(folder)
    return folder


def grown(folder: Path, seed: int = 1, tokens: int | None = 13) -> Any:
    with silent():
        model = LlamaForCausalLM.from_pretrained(folder).eval()
        torch.manual_seed(seed)
        if tokens is not None:
            model.resize_token_embeddings(tokens)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("choice", ["auto", True])
def test_a_grown_vocabulary_goes_with_the_adapter(base: Path, case: str, choice: Any, tmp_path: Path) -> None:
    for here, there in ((graftlet, peft), (peft, graftlet), (graftlet, graftlet)):
        model = adapted(grown(base), lora(here, init_lora_weights=False, **CASES[case]), here)
        move(model)
        save(model, tmp_path, save_embedding_layers=choice)
        again = load(grown(base, seed=2), tmp_path, there)
        torch.testing.assert_close(logits(again), logits(model))
    with pytest.raises(graftlet.GraftletError, match=r"resize_token_embeddings\(13\)"):
        load(grown(base, tokens=None), tmp_path)


def test_without_embeddings_a_load_says_that_the_vocabulary_differs(base: Path, tmp_path: Path) -> None:
    model = adapted(grown(base), lora())
    save(model, tmp_path, save_embedding_layers=False)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "vocab_size": "13"}.items()
        assert not [k for k in file.keys() if "lora" not in k]  # noqa: SIM118  not a dict
    with pytest.warns(BaseMismatchWarning, match=r"resize_token_embeddings\(13\)"):
        graftlet.PeftModel.from_pretrained(grown(base, tokens=None), tmp_path)
    graftlet.PeftModel.from_pretrained(grown(base), tmp_path)  # no warning


def test_a_base_without_a_path_is_remembered() -> None:
    model = graftlet.get_peft_model(llama(), lora())
    assert not [k for k in graftlet.get_peft_model_state_dict(model) if "lora" not in k]
    with silent():
        model.resize_token_embeddings(13)
    with pytest.warns(EmbeddingWarning, match="resized"):
        found = graftlet.get_peft_model_state_dict(model)
    assert {k for k in found if "lora" not in k} == {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    }


@pytest.mark.parametrize(
    ("choice", "values", "keys"),
    [
        ("auto", {"target_modules": ["embed_tokens"]}, {"model.embed_tokens.base_layer.weight"}),
        ("auto", {"target_modules": r".*embed_tokens"}, {"model.embed_tokens.base_layer.weight"}),
        ("auto", {"target_modules": ["lm_head"]}, {"lm_head.base_layer.weight"}),
        ("auto", {}, set()),
        (False, {"target_modules": ["embed_tokens"]}, set()),
        (True, {}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_which_embeddings_are_saved(choice: Any, values: dict[str, Any], keys: set[str]) -> None:
    wanted = {f"base_model.model.{key}" for key in keys}
    for lib in (peft, graftlet):
        model = adapted(llama(), lora(lib, **values), lib)
        with silent():
            found = lib.get_peft_model_state_dict(model, save_embedding_layers=choice)
        assert {k for k in found if "lora" not in k} == wanted


def test_a_merged_model_saves_its_embedding_as_it_was() -> None:
    model = adapted(llama(), lora(target_modules=["embed_tokens"], init_lora_weights=False))
    before = graftlet.get_peft_model_state_dict(model)
    before = {k: v.clone() for k, v in before.items()}
    model.merge_adapter()
    assert all(before[k].equal(v) for k, v in graftlet.get_peft_model_state_dict(model).items())


def test_an_embedding_of_another_size_leaves_the_base_alone(tmp_path: Path) -> None:
    save(adapted(llama(vocab_size=13), lora(target_modules=["embed_tokens"])), tmp_path)
    base = llama()
    before, flags = {k: v.clone() for k, v in base.state_dict().items()}, learning(base)
    with pytest.raises(AdapterFileError, match=r"13 tokens: call model.resize_token_embeddings\(13\)"):
        graftlet.PeftModel.from_pretrained(base, tmp_path)
    assert learning(base) == flags
    assert all(before[k].equal(v) for k, v in base.state_dict().items())
