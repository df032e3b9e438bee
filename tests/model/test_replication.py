# SPDX-License-Identifier: Apache-2.0
"""`layer_replication`: a deeper model out of the same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import graftlet
from graftlet.errors import ConfigError, GraftletError
from tests.model.models import (
    IDS,
    SIZES,
    Build,
    adapted,
    bert,
    facts,
    falcon,
    gpt2,
    learning,
    llama,
    load,
    logits,
    lora,
    same,
    save,
    silent,
    t5,
)  # fmt: skip

peft = pytest.importorskip("peft")

RANGES = [[0, 2], [1, 3]]


def qwen(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 4, "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1}
    return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes})).eval()


def tied(**changes: Any) -> Any:
    return llama(tie_word_embeddings=True, **changes)


def deeper(lib: Any = graftlet, **values: Any) -> Any:
    return lora(
        lib, **{"target_modules": "all-linear", "layer_replication": RANGES, "init_lora_weights": False, **values}
    )


MODELS = [llama, tied, bert, falcon, gpt2, qwen]


@pytest.mark.parametrize("build", [llama, bert])
def test_it_is_the_references(build: Build, tmp_path: Path) -> None:
    theirs, ours = adapted(build(), deeper(peft), peft), adapted(build(), deeper())
    assert set(theirs.state_dict()) == set(ours.state_dict())
    assert learning(theirs) == learning(ours)
    assert theirs.config.num_hidden_layers == ours.config.num_hidden_layers == 4
    assert theirs.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()  # the weights are shared
    save(theirs, tmp_path / "theirs")
    save(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(load(build(), tmp_path / "theirs")), logits(theirs))
    torch.testing.assert_close(logits(load(build(), tmp_path / "ours", peft)), logits(ours))


@pytest.mark.parametrize("build", MODELS)
def test_merged_it_is_a_model_of_its_own(build: Build, tmp_path: Path) -> None:
    model = adapted(build(), deeper())
    wanted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert logits(model).equal(wanted)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    with silent():
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [llama, qwen, falcon])
def test_its_cache_holds_every_block(build: Build) -> None:
    model = adapted(build(), deeper())
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with silent():
        cached = model.generate(input_ids=IDS, **options)
        assert cached.equal(model.generate(input_ids=IDS, use_cache=False, **options))


def test_unloaded_the_model_is_as_it_was() -> None:
    base = qwen()
    before, plain, kinds = facts(base), logits(base), base.config.layer_types
    adapted(base, deeper()).unload()
    assert same((before[0], set(), before[2]), base)
    assert logits(base).equal(plain)
    assert (base.config.num_hidden_layers, base.config.layer_types) == (3, kinds)


@pytest.mark.parametrize(
    ("build", "values", "message"),
    [
        (llama, {"layer_replication": [[0, 4]]}, "<= 3"),
        (llama, {"layer_replication": [[1, 1]]}, "start < end"),
        (llama, {"target_modules": ["nothing"]}, "no module"),
        (t5, {"target_modules": ["q"], "layer_replication": [[0, 2]]}, "one stack of blocks"),
    ],
)
def test_what_cannot_be_done_changes_nothing(build: Build, values: dict[str, Any], message: str) -> None:
    base = build()
    before, depth = facts(base), base.config.num_hidden_layers
    with pytest.raises(GraftletError, match=message):
        graftlet.get_peft_model(base, deeper(**values))
    assert same(before, base)
    assert base.config.num_hidden_layers == depth


def test_further_adapters_stand_on_the_same_stack() -> None:
    model = adapted(llama(), deeper())
    model.add_adapter("alike", deeper())
    model.add_adapter("plain", lora())
    assert len(model.base_model.model.model.layers) == 4
    with pytest.raises(ConfigError, match="under the adapters"):
        model.add_adapter("other", deeper(layer_replication=[[0, 1], [0, 3]]))
    shallow = adapted(llama(), lora())
    with pytest.raises(ConfigError, match="under the adapters"):
        shallow.add_adapter("deeper", deeper())
