# SPDX-License-Identifier: Apache-2.0
"""Batches of several prompts: each row is as if its adapter were alone, in calls and in generation."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import graftlet
from graftlet.errors import AdapterNameError, CallError

from .test_prompt_methods import EXAMPLES, TASKS, trained
from .test_prompts import BERT, bart, gpt2, llama, ours, t5

IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 8, 7, 6, 5], [1, 3, 5, 7, 9], [2, 2, 4, 4, 6]])
ROWS = ["default", "other", "__base__", "default"]
SOFT = ("PromptTuningConfig", "PromptEncoderConfig")
CACHED = ("PrefixTuningConfig", "CartridgeConfig")
DECODERS = {"llama": llama, "gpt2": gpt2}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
MASKS = {"whole": None, "left": LEFT, "right": LEFT.flip(1)}


def several(make, kinds, task, tokens=(3, 2), **fields):
    """A model with two adapters, named `default` and `other`."""
    model = ours(make, kinds[0], task, num_virtual_tokens=tokens[0], **fields)
    config = getattr(graftlet, kinds[1])(num_virtual_tokens=tokens[1], task_type=task, **fields)
    model.add_adapter("other", config)
    return trained(model).eval()


def lengths(model, rows=ROWS):
    return [0 if r == "__base__" else model.peft_config[r].num_virtual_tokens for r in rows]


def alone(model, row, **call):
    """One row's output by its adapter."""
    one = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    return model(**one, adapter_names=[ROWS[row]])


def test_one_name_for_all_rows_is_that_adapter():
    model = several(llama, SOFT, "CAUSAL_LM")
    named = model(input_ids=IDS, labels=IDS, adapter_names=["other"] * 4)
    base = model(input_ids=IDS, adapter_names=["__base__"] * 4).logits
    torch.testing.assert_close(base, model.get_base_model()(input_ids=IDS).logits)
    model.set_adapter("other")
    active = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close((named.logits, named.loss), (active.logits, active.loss))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("kinds", [SOFT, CACHED], ids=["soft", "cached"])
def test_each_row_is_as_if_alone(kinds, make, mask):
    model, call = several(make, kinds, "CAUSAL_LM"), {"input_ids": IDS}
    if MASKS[mask] is not None:
        call["attention_mask"] = MASKS[mask]
    whole = model(**call, adapter_names=ROWS).logits
    for row in range(4):
        expected = alone(model, row, **call).logits
        real = alone(model, row, **call).logits.shape[1] - 5
        keep = torch.ones(real + 5, dtype=torch.bool)
        if MASKS[mask] is not None:
            keep[real:] = MASKS[mask][row].bool()
        torch.testing.assert_close(whole[row, -expected.shape[1] :][keep], expected[0][keep])


@pytest.mark.parametrize("kinds", [SOFT, CACHED], ids=["soft", "cached"])
def test_losses_and_gradients_are_the_rows(kinds):
    model = several(llama, kinds, "CAUSAL_LM")
    for name in ("default", "other"):
        model.set_requires_grad(name, True)
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = model(input_ids=IDS, labels=IDS, adapter_names=ROWS).loss
    made = torch.autograd.grad(loss, learn.values(), allow_unused=True)
    # a soft prompt's last token says the input's first one, which a prefix and the base cannot
    counts = [4 + (kinds is SOFT and n > 0) for n in lengths(model)]
    parts = [alone(model, row, input_ids=IDS, labels=IDS).loss * n for row, n in enumerate(counts)]
    total = sum(parts) / sum(counts)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(made, torch.autograd.grad(total, learn.values(), allow_unused=True))
    assert sum(bool(g.any()) for g in made if g is not None) >= 2


@pytest.mark.parametrize("tokens", [(3, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("kinds", [SOFT, CACHED], ids=["soft", "cached"])
def test_each_row_is_generated_as_if_alone(kinds, make, tokens):
    model = several(make, kinds, "CAUSAL_LM", tokens)
    for settings in ({}, {"attention_mask": LEFT}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}):
        many = settings.get("num_return_sequences", 1)
        made = model.generate(input_ids=IDS, adapter_names=ROWS, **GREEDY, **settings)
        for row in range(4):
            one = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
            expected = model.generate(input_ids=IDS[row : row + 1], adapter_names=[ROWS[row]], **GREEDY, **one)
            assert made[many * row : many * (row + 1)].tolist() == expected.tolist()


@pytest.mark.parametrize("mask", ["whole", "left"])
@pytest.mark.parametrize("kinds", [SOFT, CACHED], ids=["soft", "cached"])
def test_a_callers_cache_goes_on(kinds, mask):
    model, call = several(llama, kinds, "CAUSAL_LM"), {}
    if MASKS[mask] is not None:
        call["attention_mask"] = MASKS[mask]
    whole = model(input_ids=IDS, adapter_names=ROWS, **call).logits
    first = model(input_ids=IDS[:, :3], adapter_names=ROWS, use_cache=True, **{k: v[:, :3] for k, v in call.items()})
    then = model(input_ids=IDS[:, 3:], adapter_names=ROWS, cache=first["past_key_values"], **call)
    torch.testing.assert_close(then.logits, whole[:, -2:])


def test_given_positions_and_embeddings():
    model = several(llama, SOFT, "CAUSAL_LM")
    plain = model(input_ids=IDS, adapter_names=ROWS).logits
    for places in (torch.arange(5).expand(4, -1), torch.arange(5)[None]):
        torch.testing.assert_close(model(input_ids=IDS, position_ids=places, adapter_names=ROWS).logits, plain)
    embeds = model.word_embeddings(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds, adapter_names=ROWS).logits, plain)
    made = model.generate(inputs_embeds=embeds, adapter_names=ROWS, **GREEDY)
    assert made.tolist() == model.generate(input_ids=IDS, adapter_names=ROWS, **GREEDY)[:, 5:].tolist()


@pytest.mark.parametrize("mask", ["whole", "right"])
@pytest.mark.parametrize(
    ("kind", "task", "fields"),
    [
        (BertForSequenceClassification, "SEQ_CLS", ["logits"]),
        (BertForTokenClassification, "TOKEN_CLS", ["logits"]),
        (BertForQuestionAnswering, "QUESTION_ANS", ["start_logits", "end_logits"]),
        (BertModel, "FEATURE_EXTRACTION", ["last_hidden_state", "pooler_output"]),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_an_encoders_rows_begin_together(kind, task, fields, mask):
    model, call = several(lambda: kind(BERT), SOFT, task), {"input_ids": IDS}
    if MASKS[mask] is not None:
        call["attention_mask"] = MASKS[mask]
    whole = model(**call, adapter_names=ROWS)
    for row in range(4):
        one = alone(model, row, **call)
        for field in fields:
            mixed, expected = getattr(whole, field)[row], getattr(one, field)[0]
            if task != "SEQ_CLS" and field != "pooler_output":
                real = lengths(model)[row] + (5 if MASKS[mask] is None else int(MASKS[mask][row].sum()))
                mixed, expected = mixed[:real], expected[:real]
            torch.testing.assert_close(mixed, expected)


def test_an_encoders_labels_stay_with_their_tokens():
    model = several(lambda: BertForTokenClassification(BERT), SOFT, "TOKEN_CLS")
    labels = torch.tensor([[0, 1, 0, 1, 1]] * 4)
    whole = model(input_ids=IDS, labels=labels, adapter_names=ROWS).loss
    parts = [alone(model, row, input_ids=IDS, labels=labels).loss for row in range(4)]
    torch.testing.assert_close(whole, sum(parts) / 4)
    model = several(lambda: BertForQuestionAnswering(BERT), SOFT, "QUESTION_ANS")
    places = {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([1, 2, 3, 4])}
    whole = model(input_ids=IDS, adapter_names=ROWS, **places)
    for row, count in enumerate(lengths(model)):
        one = alone(model, row, input_ids=IDS)
        torch.testing.assert_close(whole.start_logits[row, : count + 5], one.start_logits[0])
    both = [whole.start_logits, whole.end_logits]
    at = [p + torch.tensor(lengths(model)) for p in places.values()]
    expected = sum(torch.nn.functional.cross_entropy(*pair) for pair in zip(both, at, strict=True)) / 2
    torch.testing.assert_close(whole.loss, expected)


def test_a_causal_classifier_reads_the_last_token_and_each_rows_head():
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = several(lambda: LlamaForSequenceClassification(config), SOFT, "SEQ_CLS")
    heads = model.base_model.score.modules_to_save
    assert not torch.equal(heads["default"].weight, heads["other"].weight)
    whole = model(input_ids=IDS, adapter_names=ROWS).logits
    for row in range(4):
        torch.testing.assert_close(whole[row : row + 1], alone(model, row, input_ids=IDS).logits)


@pytest.mark.parametrize("mask", ["whole", "right"])
@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
def test_an_encoder_decoders_encoder_gets_each_rows_prompt(make, mask):
    model, call = several(make, SOFT, "SEQ_2_SEQ_LM"), {"input_ids": IDS, "labels": IDS.flip(0)}
    if MASKS[mask] is not None:
        call["attention_mask"] = MASKS[mask]
    whole = model(**call, adapter_names=ROWS).logits
    given = {k: v for k, v in call.items() if k != "labels"}
    made = model.generate(**given, adapter_names=ROWS, **GREEDY)
    beams = model.generate(**given, adapter_names=ROWS, num_beams=2, **GREEDY)
    for row in range(4):
        torch.testing.assert_close(whole[row : row + 1], alone(model, row, **call).logits)
        one = {k: v[row : row + 1] for k, v in given.items()}
        for found, beam in ((made, 1), (beams, 2)):
            expected = model.generate(**one, adapter_names=[ROWS[row]], num_beams=beam, **GREEDY)
            assert found[row].tolist() == expected[0].tolist()


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
def test_prefixes_of_one_length_in_a_decoder_without_positions(make):
    model = several(make, CACHED, "SEQ_2_SEQ_LM", (3, 3))
    call, rows = {"input_ids": IDS, "labels": IDS.flip(0)}, ["default", "other", "other", "default"]
    whole = model(**call, adapter_names=rows).logits
    made = model.generate(input_ids=IDS, adapter_names=rows, **GREEDY)
    for row, name in enumerate(rows):
        one = {k: v[row : row + 1] for k, v in call.items()}
        torch.testing.assert_close(whole[row : row + 1], model(**one, adapter_names=[name]).logits)
        expected = model.generate(input_ids=IDS[row : row + 1], adapter_names=[name], **GREEDY)
        assert made[row].tolist() == expected[0].tolist()
    with pytest.raises(CallError, match="decoder_position_ids"):
        model(**call, adapter_names=ROWS)


def test_tasks_go_to_their_rows():
    model = ours(llama, "MultitaskPromptTuningConfig", "CAUSAL_LM", **TASKS)
    model.add_adapter("other", graftlet.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model, tasks = trained(model), torch.tensor([2, 0, 0, 1])
    whole = model(input_ids=IDS, task_ids=tasks, adapter_names=ROWS).logits
    made = model.generate(input_ids=IDS, task_ids=tasks, adapter_names=ROWS, num_beams=2, **GREEDY)
    for row in range(4):
        own = {} if ROWS[row] != "default" else {"task_ids": tasks[row : row + 1]}
        expected = model(input_ids=IDS[row : row + 1], adapter_names=[ROWS[row]], **own).logits
        torch.testing.assert_close(whole[row, -expected.shape[1] :], expected[0])
        given = {"input_ids": IDS[row : row + 1], "adapter_names": [ROWS[row]], "num_beams": 2, **own}
        assert made[row].tolist() == model.generate(**given, **GREEDY)[0].tolist()
    with pytest.raises(CallError, match="give one a row"):
        model(input_ids=IDS, task_ids=tasks[:2], adapter_names=ROWS)


def test_a_loss_of_its_own_cannot_be_shared():
    model = ours(llama, "PromptTuningConfig", "CAUSAL_LM")
    model.add_adapter("other", graftlet.CPTConfig(task_type="CAUSAL_LM", **EXAMPLES))
    whole = model(input_ids=IDS, adapter_names=ROWS).logits
    torch.testing.assert_close(whole[1], alone(model, 1, input_ids=IDS).logits[0])
    with pytest.raises(CallError, match="labels cannot be given"):
        model(input_ids=IDS, labels=IDS, adapter_names=ROWS)
    named = model(input_ids=IDS, labels=IDS, adapter_names=["other"] * 4).loss
    model.set_adapter("other")
    torch.testing.assert_close(named, model(input_ids=IDS, labels=IDS).loss)


def test_wrong_batches_are_refused():
    model = several(llama, SOFT, "CAUSAL_LM")
    model.add_adapter("cached", graftlet.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(CallError, match="mix one kind"):
        model(input_ids=IDS, adapter_names=["default", "cached", "__base__", "other"])
    with pytest.raises(CallError, match="4 rows"):
        model(input_ids=IDS, adapter_names=["default", "other"])
    with pytest.raises(AdapterNameError, match="nobody"):
        model(input_ids=IDS, adapter_names=["default", "other", "nobody", "default"])


@pytest.mark.parametrize("kinds", [SOFT, CACHED], ids=["soft", "cached"])
def test_disabled_is_the_base_whatever_is_named(kinds):
    model = several(llama, kinds, "CAUSAL_LM")
    with model.disable_adapter():
        off = model(input_ids=IDS, adapter_names=ROWS).logits
    torch.testing.assert_close(off, model.get_base_model()(input_ids=IDS).logits)


def test_soft_prompts_of_a_batch_learn_through_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = several(llama, SOFT, "CAUSAL_LM").train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        for name in ("default", "other"):
            model.set_requires_grad(name, True)
        model(input_ids=IDS, labels=IDS, adapter_names=ROWS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads)
    assert {n.split(".")[1] for n in grads[0]} == {"default", "other"}


def test_a_causal_tagger_keeps_the_first_tokens_label():
    from transformers import LlamaForTokenClassification

    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = several(lambda: LlamaForTokenClassification(config), SOFT, "TOKEN_CLS")
    labels = torch.tensor([[0, 1, 0, 1, 1]] * 4)
    whole = model(input_ids=IDS, labels=labels, adapter_names=ROWS).loss
    parts = [alone(model, row, input_ids=IDS, labels=labels).loss for row in range(4)]
    torch.testing.assert_close(whole, sum(parts) / 4)
