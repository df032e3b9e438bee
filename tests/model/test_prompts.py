# SPDX-License-Identifier: Apache-2.0
"""Prompt and prefix tuning on decoders, encoders and encoder-decoders, beside the reference and beside themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graftlet
from graftlet.errors import CallError, ConfigError

IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 8, 7, 6, 5]])
BERT = BertConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32,
)  # fmt: skip


def llama(**kw):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **kw))


def gpt2():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


def t5():
    config = T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def bart():
    config = BartConfig(
        vocab_size=11, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


DECODERS = {"llama": llama, "gpt2": gpt2}
SEQ2SEQ = {"t5": t5, "bart": bart}
SOFT = ["PromptTuningConfig", "PromptEncoderConfig"]
KINDS = [*SOFT, "PrefixTuningConfig", "CartridgeConfig"]


def both(make, kind, task, **fields):
    """The same adapted model by Graftlet and by the reference, with the same random prompt."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = make().eval()
    fields = {"num_virtual_tokens": 3, "task_type": task, **fields}
    ours = graftlet.get_peft_model(copy.deepcopy(base), getattr(graftlet, kind)(**fields)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(**fields)).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def ours(make, kind, task, **fields):
    torch.manual_seed(0)
    fields = {"num_virtual_tokens": 3, "task_type": task, **fields}
    return graftlet.get_peft_model(make(), getattr(graftlet, kind)(**fields)).eval()


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_gives_what_the_reference_gives(make, kind):
    mine, theirs = both(make, kind, "CAUSAL_LM")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for given in ({"labels": IDS}, {"attention_mask": mask}, {"labels": IDS, "attention_mask": mask}):
        a, b = mine(input_ids=IDS, **given), theirs(input_ids=IDS, **given)
        torch.testing.assert_close(a.logits, b.logits)
        if "labels" in given:
            torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize("make", SEQ2SEQ.values(), ids=SEQ2SEQ)
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_gives_what_the_reference_gives(make, kind):
    mine, theirs = both(make, kind, "SEQ_2_SEQ_LM")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    a, b = (m(input_ids=IDS, attention_mask=mask, labels=IDS) for m in (mine, theirs))
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize(
    ("kind", "task", "field"),
    [
        (BertForSequenceClassification, "SEQ_CLS", "logits"),
        (BertForTokenClassification, "TOKEN_CLS", "logits"),
        (BertForQuestionAnswering, "QUESTION_ANS", "start_logits"),
        (BertModel, "FEATURE_EXTRACTION", "last_hidden_state"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
@pytest.mark.parametrize("config", SOFT)
def test_an_encoder_gives_what_the_reference_gives(config, kind, task, field):
    mine, theirs = both(lambda: kind(BERT), config, task)
    torch.testing.assert_close(getattr(mine(input_ids=IDS), field), getattr(theirs(input_ids=IDS), field))


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_greedy_loop(make, kind):
    model = ours(make, kind, "CAUSAL_LM")
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    made = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.tolist() == ids.tolist()


@pytest.mark.parametrize("make", SEQ2SEQ.values(), ids=SEQ2SEQ)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_of_an_encoder_decoder_is_the_greedy_loop(make, kind):
    model = ours(make, kind, "SEQ_2_SEQ_LM")
    ids = torch.full((2, 1), model.base_model.config.decoder_start_token_id)
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=IDS, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    made = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.tolist() == ids.tolist()


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_no_answer(make, kind):
    model = ours(make, kind, "CAUSAL_LM")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(input_ids=IDS[:1], **settings)[:, 5:]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1]], 1)
    mask = (padded != 0).long()
    assert model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 7:].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_several_sequences(kind):
    model = ours(llama, kind, "CAUSAL_LM")
    made = model.generate(
        input_ids=IDS, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=0
    )
    assert made.shape[0] == 4
    assert made[::2, :5].tolist() == IDS.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_leaves_nothing_behind(kind):
    model = ours(llama, kind, "CAUSAL_LM")
    before = dict(vars(model.base_model))
    with pytest.raises(ValueError):
        model.generate(input_ids=IDS, max_new_tokens=-3)
    assert vars(model.base_model).keys() == before.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_position_ids_move_up_with_the_prompt(kind):
    model = ours(llama, kind, "CAUSAL_LM")
    plain = model(input_ids=IDS).logits
    given = model(input_ids=IDS, position_ids=torch.arange(5).expand(2, -1)).logits
    torch.testing.assert_close(given, plain)


def test_input_embeddings_in_place_of_ids():
    model = ours(llama, "PromptTuningConfig", "CAUSAL_LM")
    embeds = model.word_embeddings(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids=IDS).logits)
    with pytest.raises(CallError, match="one of the two"):
        model(input_ids=IDS, inputs_embeds=embeds)


def test_labels_of_tokens_grow_and_labels_of_answers_move():
    model = ours(lambda: BertForTokenClassification(BERT), "PromptTuningConfig", "TOKEN_CLS")
    assert model(input_ids=IDS, labels=torch.zeros_like(IDS)).loss.isfinite()
    model = ours(lambda: BertForQuestionAnswering(BERT), "PromptTuningConfig", "QUESTION_ANS")
    logits = model(input_ids=IDS).start_logits
    loss = model(input_ids=IDS, start_positions=torch.tensor([0, 1]), end_positions=torch.tensor([0, 1])).loss
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 4]))
    ends = torch.nn.functional.cross_entropy(model(input_ids=IDS).end_logits, torch.tensor([3, 4]))
    torch.testing.assert_close(loss, (wanted + ends) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prompt_learns_and_disabling_gives_the_base(kind):
    model = ours(llama, kind, "CAUSAL_LM")
    model(input_ids=IDS, labels=IDS).loss.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    own = {n for n, _ in model.named_parameters() if n.startswith("prompt_encoder.")}
    assert learning == own - {"prompt_encoder.default.frozen_embedding"}
    with model.disable_adapter():
        off = model(input_ids=IDS).logits
    torch.testing.assert_close(off, model.get_base_model()(input_ids=IDS).logits)


@pytest.mark.parametrize("fields", [{}, {"prefix_projection": True}, {"init_weights": "zero"}], ids=str)
def test_prefix_files_both_ways(fields, tmp_path):
    mine, theirs = both(llama, "PrefixTuningConfig", "CAUSAL_LM", **fields)
    _files_both_ways(mine, theirs, tmp_path)


@pytest.mark.parametrize("make", [llama, t5], ids=["llama", "t5"])
def test_prompt_files_both_ways(make, tmp_path):
    task = "CAUSAL_LM" if make is llama else "SEQ_2_SEQ_LM"
    mine, theirs = both(make, "PromptTuningConfig", task)
    _files_both_ways(mine, theirs, tmp_path)


def _files_both_ways(mine, theirs, folder):
    peft = pytest.importorskip("peft")
    base = mine.get_base_model()
    expected = _logits(mine)
    mine.save_pretrained(folder / "mine")
    theirs.save_pretrained(folder / "theirs")
    for kind, place in ((peft.PeftModel, "mine"), (graftlet.PeftModel, "theirs"), (graftlet.PeftModel, "mine")):
        torch.testing.assert_close(_logits(kind.from_pretrained(copy.deepcopy(base), folder / place).eval()), expected)


def _logits(model):
    labels = {"labels": IDS} if model.base_model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **labels).logits


def test_a_head_is_trained_and_saved_with_the_prompt(tmp_path):
    mine, theirs = both(lambda: BertForSequenceClassification(BERT), "PromptTuningConfig", "SEQ_CLS")
    assert set(graftlet.get_peft_model_state_dict(mine)) == {
        "prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias",
    }  # fmt: skip
    assert mine.base_model.classifier.modules_to_save["default"].weight.requires_grad
    mine.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = graftlet.PeftModel.from_pretrained(BertForSequenceClassification(BERT), tmp_path).eval()
    assert fresh.peft_config["default"].modules_to_save == ["classifier", "score"]
    torch.testing.assert_close(fresh(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_several_prompts_beside_each_other(tmp_path):
    model = ours(llama, "PromptTuningConfig", "CAUSAL_LM")
    first = _logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("other", graftlet.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    torch.testing.assert_close(_logits(model), first)
    model.set_adapter("other")
    assert _logits(model).shape[1] == 7
    assert [p.requires_grad for p in model.prompt_encoder["default"].parameters()] == [False]
    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    torch.testing.assert_close(_logits(model), first)
    model.delete_adapter("third")
    assert model.active_adapters == ["default"]


def test_a_text_starts_the_prompt(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    model = ours(
        llama, "PromptTuningConfig", "CAUSAL_LM", prompt_tuning_init="TEXT", prompt_tuning_init_text="c d",
        tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    expected = model.word_embeddings(torch.tensor([2, 3, 2]))
    torch.testing.assert_close(model.prompt_encoder["default"].rows(), expected)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt_tuning_init": "TEXT"}, "needs tokenizer_name_or_path"),
        ({"prompt_tuning_init": "NOISE"}, "allowed: TEXT"),
        ({"tokenizer_kwargs": {"a": 1}}, "goes with"),
        ({"num_virtual_tokens": 0}, "positive"),
    ],
)
def test_wrong_configs_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        ours(llama, "PromptTuningConfig", "CAUSAL_LM", **fields)


def test_a_file_cannot_switch_remote_code_on(tmp_path: Path):
    config = graftlet.PromptTuningConfig(
        prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="x",
        tokenizer_kwargs={"trust_remote_code": True, "revision": "main"},
    )  # fmt: skip
    config.save_pretrained(tmp_path)  # what one's own code may ask for is not handed on
    assert graftlet.PeftConfig.from_pretrained(tmp_path).tokenizer_kwargs == {"revision": "main"}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_kwargs": {"trust_remote_code": True}}))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        graftlet.PeftConfig.from_pretrained(tmp_path)


def test_a_plain_module_is_refused():
    with pytest.raises(ConfigError, match="transformers model"):
        graftlet.get_peft_model(torch.nn.Linear(2, 2), graftlet.PromptTuningConfig(num_virtual_tokens=2))


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(ConfigError, match="no key-value cache"):
        ours(lambda: BertForSequenceClassification(BERT), "PrefixTuningConfig", "SEQ_CLS")


def test_a_prefix_refuses_checkpointing_rather_than_vanish():
    model = ours(llama, "PrefixTuningConfig", "CAUSAL_LM").train()
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(CallError, match="checkpointing"):
        model(input_ids=IDS, labels=IDS)


def test_a_soft_prompt_learns_through_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = ours(llama, "PromptTuningConfig", "CAUSAL_LM").train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(model.prompt_encoder["default"].embedding.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_file_of_another_size_is_refused_and_the_model_stays(tmp_path):
    ours(llama, "PromptTuningConfig", "CAUSAL_LM").save_pretrained(tmp_path)
    base = llama(max_position_embeddings=64)
    config = base.config.to_dict()
    wide = LlamaForCausalLM(LlamaConfig(**{**config, "hidden_size": 16}))
    flags = [p.requires_grad for p in wide.parameters()]
    with pytest.raises(ConfigError, match="another base"):
        graftlet.PeftModel.from_pretrained(wide, tmp_path)
    assert [p.requires_grad for p in wide.parameters()] == flags


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_its_own(kind):
    model = ours(llama, kind, "CAUSAL_LM")
    twin = copy.deepcopy(model)
    torch.testing.assert_close(_logits(twin), _logits(model))
    for parameter in twin.prompt_encoder.parameters():
        parameter.data.zero_()
    assert not torch.equal(_logits(twin), _logits(model))
