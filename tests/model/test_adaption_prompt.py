# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Adapter on whole attention blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import graftlet
from graftlet.errors import CallError, ConfigError, MergeError, UnsupportedLayerError
from tests.model.test_prompts import BERT, IDS, BertModel, gpt2, llama


def mistral():
    config = MistralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return MistralForCausalLM(config)


MODELS = {"llama": llama, "mistral": mistral, "gpt2": gpt2}
FIELDS = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}


def ours(make=llama, gate=0.5, **fields):
    torch.manual_seed(0)
    model = graftlet.get_peft_model(make(), graftlet.AdaptionPromptConfig(**{**FIELDS, **fields})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(gate)
    return model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gives_what_the_reference_gives_and_files_go_both_ways(make, tmp_path):
    peft = pytest.importorskip("peft")
    mine = ours(make, adapter_layers=2)
    torch.manual_seed(0)
    base = make().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.AdaptionPromptConfig(**{**FIELDS, "adapter_layers": 2})
    ).eval()
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(mine.state_dict())
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(mine(input_ids=IDS).logits, expected)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    for kind, place in ((peft.PeftModel, "mine"), (graftlet.PeftModel, "theirs"), (graftlet.PeftModel, "mine")):
        fresh = kind.from_pretrained(copy.deepcopy(base), tmp_path / place).eval()
        torch.testing.assert_close(fresh(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_starts_as_the_base(make):
    model = ours(make, gate=0)
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, base)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_generation_is_the_greedy_loop(make):
    model, ids = ours(make, gate=2.0), IDS
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    made = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.tolist() == ids.tolist()


def test_only_prompt_and_gate_learn():
    model = ours()
    model(input_ids=IDS, labels=IDS).loss.backward()
    learning = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert learning == {"adaption_prompt", "adaption_gate"}


def test_several_adapters_are_swapped():
    model = ours()
    first = model(input_ids=IDS).logits
    model.add_adapter("other", graftlet.AdaptionPromptConfig(**FIELDS))
    torch.testing.assert_close(model(input_ids=IDS).logits, first)
    model.set_adapter("other")
    assert not torch.equal(model(input_ids=IDS).logits, first)
    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=IDS).logits, first)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


def test_unload_gives_the_base_back():
    model = ours()
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    plain = model.unload()
    assert torch.equal(plain(input_ids=IDS).logits, base)
    assert not any("adaption" in n for n, _ in plain.named_parameters())


def test_what_cannot_be_done_is_said():
    model = ours()
    with pytest.raises(MergeError, match="attended to"):
        model.merge_adapter()
    with pytest.raises(CallError, match="cannot be mixed"):
        model(input_ids=IDS, adapter_names=["default", "default"])
    with pytest.raises(ConfigError, match="has 2 such layers"):
        ours(adapter_layers=5)
    with pytest.raises(ConfigError, match="adapter_len is not given"):
        ours(adapter_len=None)
    with pytest.raises(UnsupportedLayerError, match="q_proj"):
        ours(lambda: BertModel(BERT), target_modules="self", task_type=None)
