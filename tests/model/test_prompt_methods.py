# SPDX-License-Identifier: Apache-2.0
"""What each prompt method has of its own: networks, tasks, bounds and losses, caches of texts."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import graftlet
from graftlet.errors import CallError, ConfigError

from .test_prompts import BERT, IDS, _logits, both, gpt2, llama, ours, t5

TASK = "CAUSAL_LM"
EXAMPLES = {"cpt_token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "cpt_tokens_type_mask": [0, 1, 2, 3, 4, 5, 6, 7, 8]}
TASKS = {"num_tasks": 3, "num_ranks": 2}
FIELDS = {
    "p-tuning": ("PromptEncoderConfig", {}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5}),
    "multitask": ("MultitaskPromptTuningConfig", TASKS),
    "cpt": ("CPTConfig", {**EXAMPLES, "num_virtual_tokens": 9}),
    "cpt-decay": (
        "CPTConfig",
        {**EXAMPLES, "num_virtual_tokens": 9, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5},
    ),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "cartridge-free": ("CartridgeConfig", {"num_frozen_tokens": 0}),
}
CALLS = {"multitask": {"task_ids": torch.tensor([2, 0])}}


def trained(model):
    """The model with its prompt moved, the same way for the same names."""
    torch.manual_seed(3)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", FIELDS)
def test_outputs_losses_and_gradients_are_the_references(name, make):
    kind, fields = FIELDS[name]
    mine, theirs = (trained(m) for m in both(make, kind, TASK, **fields))
    learn = {n for n, p in mine.named_parameters() if p.requires_grad}
    assert learn == {n for n, p in theirs.named_parameters() if p.requires_grad}
    call = {"input_ids": IDS, "labels": IDS, **CALLS.get(name, {})}
    a, b = mine(**call), theirs(**call)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    expected = dict(theirs.named_parameters())
    for n in learn:
        torch.testing.assert_close(mine.get_parameter(n).grad, expected[n].grad)


@pytest.mark.parametrize("name", FIELDS)
def test_files_both_ways(name, tmp_path):
    peft = pytest.importorskip("peft")
    kind, fields = FIELDS[name]
    mine, theirs = (trained(m) for m in both(llama, kind, TASK, **fields))
    base, call = mine.get_base_model(), {"input_ids": IDS, **CALLS.get(name, {})}
    expected = mine(**call).logits.detach()
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("mine", "theirs")]
    assert configs[0] == configs[1]
    for library, who in itertools.product((peft, graftlet), ("mine", "theirs")):
        fresh = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / who).eval()
        torch.testing.assert_close(fresh(**call).logits, expected)


@pytest.mark.parametrize("name", FIELDS)
def test_a_copy_is_equal_and_its_own(name):
    kind, fields = FIELDS[name]
    model, call = trained(ours(llama, kind, TASK, **fields)), {"input_ids": IDS, **CALLS.get(name, {})}
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**call).logits, model(**call).logits)
    twin(**call, labels=IDS).loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FIELDS)
def test_disabling_gives_the_base(name):
    kind, fields = FIELDS[name]
    model = trained(ours(llama, kind, TASK, **fields))
    call = {"input_ids": IDS, "labels": IDS}
    with model.disable_adapter():
        off = model(**call, **CALLS.get(name, {}))
    plain = model.get_base_model()(**call)
    torch.testing.assert_close((off.logits, off.loss), (plain.logits, plain.loss))


@pytest.mark.parametrize("name", FIELDS)
def test_generation_is_the_greedy_loop(name):
    kind, fields = FIELDS[name]
    model, own = trained(ours(llama, kind, TASK, **fields)), CALLS.get(name, {})
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids, **own).logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(input_ids=IDS, **settings, **own).tolist() == ids.tolist()
    beams = model.generate(input_ids=IDS, num_beams=2, num_return_sequences=2, **settings, **own)
    assert beams.shape == (4, 9)


@pytest.mark.parametrize("name", ["p-tuning", "lstm", "cpt", "cartridge"])
def test_a_loaded_prompt_learns_on_from_its_rows(name, tmp_path):
    kind, fields = FIELDS[name]
    model = trained(ours(llama, kind, TASK, **fields))
    model.save_pretrained(tmp_path)
    again = graftlet.PeftModel.from_pretrained(model.get_base_model(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(_logits(again), _logits(model))
    again(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in again.prompt_encoder.parameters())


# p-tuning


@pytest.mark.filterwarnings("ignore::graftlet.errors.BaseMismatchWarning")
@pytest.mark.parametrize("name", ["p-tuning", "lstm"])
def test_a_loaded_prompt_has_no_network(name, tmp_path):
    kind, fields = FIELDS[name]
    model = ours(llama, kind, TASK, **fields)
    model.save_pretrained(tmp_path)
    loaded = graftlet.PeftModel.from_pretrained(llama(), tmp_path)
    assert [n for n, _ in loaded.prompt_encoder.named_parameters()] == ["default.embedding.weight"]
    rows = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    with pytest.raises(ConfigError, match="trains through a network"):
        graftlet.set_peft_model_state_dict(model, {"prompt_embeddings": rows})


def test_a_file_is_written_without_dropout():
    fields = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}
    model = ours(llama, "PromptEncoderConfig", TASK, **fields).train()
    first, second = (graftlet.get_peft_model_state_dict(model)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(first, second)
    assert model.prompt_encoder["default"].training


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"encoder_reparameterization_type": "GRU"}, "allowed: MLP, LSTM"),
        ({"encoder_num_layers": 0}, "one at least"),
        ({"encoder_dropout": 1.0}, "to below 1"),
        ({"encoder_hidden_size": 0}, "positive"),
    ],
)
def test_wrong_networks_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        graftlet.PromptEncoderConfig(**fields)


# multitask


def test_each_row_has_its_tasks_prompt():
    model = trained(ours(llama, "MultitaskPromptTuningConfig", TASK, **TASKS))
    mixed = model(input_ids=IDS, task_ids=torch.tensor([2, 0])).logits
    for row, task in enumerate((2, 0)):
        alone = model(input_ids=IDS[row : row + 1], task_ids=[task]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone)
    encoder = model.prompt_encoder["default"]
    factor = encoder.prefix_task_cols[2] @ encoder.prefix_task_rows[2]
    torch.testing.assert_close(model.get_prompt(1, torch.tensor([2]))[0], encoder.embedding.weight * factor)


def test_an_encoders_rows_have_tasks():
    mine, theirs = both(lambda: BertForSequenceClassification(BERT), "MultitaskPromptTuningConfig", "SEQ_CLS", **TASKS)
    call = {"input_ids": IDS, "labels": torch.tensor([0, 1]), "task_ids": torch.tensor([2, 0])}
    a, b = mine(**call), theirs(**call)
    torch.testing.assert_close((a.logits, a.loss), (b.logits, b.loss))


@pytest.mark.parametrize("given", [{}, {"task_ids": [0]}, {"task_ids": [0, 3]}, {"task_ids": [-1, 0]}], ids=str)
def test_wrong_tasks_are_refused(given):
    model = ours(llama, "MultitaskPromptTuningConfig", TASK, **TASKS)
    with pytest.raises(CallError, match="2 numbers from 0 to 2"):
        model(input_ids=IDS, **given)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_source_starts_the_prompt(kind, suffix, tmp_path):
    source = trained(ours(llama, "MultitaskPromptTuningConfig", TASK, **TASKS))
    tensors = {k: v.detach().clone() for k, v in graftlet.get_peft_model_state_dict(source).items()}
    path = tmp_path / f"source.{suffix}"
    if suffix == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    start = {"prompt_tuning_init": kind, "prompt_tuning_init_state_dict_path": str(path), "prompt_tuning_init_task": 1}
    _, theirs = both(llama, "MultitaskPromptTuningConfig", TASK, num_ranks=2, **start)
    made = ours(llama, "MultitaskPromptTuningConfig", TASK, num_ranks=2, **start)
    expected = theirs.prompt_encoder["default"].state_dict()
    held = made.prompt_encoder["default"].state_dict()
    shared = [k for k in expected if kind != "ONLY_SOURCE_SHARED" or k == "embedding.weight"]
    for key in shared:
        assert torch.equal(held[key], expected[key]), key
    many = ours(llama, "MultitaskPromptTuningConfig", TASK, num_ranks=2, num_tasks=2, **start)
    factors = many.prompt_encoder["default"].prefix_task_cols
    assert torch.equal(factors[0], factors[1]) == (kind != "ONLY_SOURCE_SHARED")


@pytest.mark.filterwarnings("ignore::graftlet.errors.BaseMismatchWarning")
def test_a_saved_prompt_needs_its_source_no_more(tmp_path):
    source = ours(llama, "MultitaskPromptTuningConfig", TASK, **TASKS)
    source.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "adapter_model.safetensors"
    start = {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": str(file)}
    made = ours(llama, "MultitaskPromptTuningConfig", TASK, num_ranks=2, **start)
    made.save_pretrained(tmp_path / "made")
    file.unlink()
    again = graftlet.PeftModel.from_pretrained(llama(), tmp_path / "made")
    for key, tensor in graftlet.get_peft_model_state_dict(made).items():
        assert torch.equal(graftlet.get_peft_model_state_dict(again)[key], tensor)


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_state_dict_path"):
        graftlet.MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK")
    with pytest.raises(ConfigError, match="allowed: TEXT, RANDOM, AVERAGE"):
        graftlet.MultitaskPromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB")
    start = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": str(tmp_path / "s.bin")}
    torch.save({"prompt_embeddings": print}, tmp_path / "s.bin")  # a function: what a pickle may run
    with pytest.raises(graftlet.errors.AdapterFileError, match="cannot be read"):
        ours(llama, "MultitaskPromptTuningConfig", TASK, **start)
    torch.save({"prompt_embeddings": torch.zeros(3, 8)}, tmp_path / "s.bin")
    with pytest.raises(ConfigError, match="has no prefix_task_cols"):
        ours(llama, "MultitaskPromptTuningConfig", TASK, **start)
    torch.save({"prompt_embeddings": torch.zeros(2, 8)}, tmp_path / "s.bin")
    with pytest.raises(ConfigError, match="this prompt needs"):
        ours(llama, "MultitaskPromptTuningConfig", TASK, **start)
    factors = {"prefix_task_cols": torch.zeros(2, 3, 1), "prefix_task_rows": torch.zeros(2, 1, 8)}
    torch.save({"prompt_embeddings": torch.zeros(3, 8), **factors}, tmp_path / "s.bin")
    with pytest.raises(ConfigError, match="the source has 2 tasks"):
        ours(llama, "MultitaskPromptTuningConfig", TASK, **start, prompt_tuning_init_task=2)


def test_an_encoder_decoders_call_and_generation_have_the_same_prompt():
    """The reference puts half of the prompt before the decoder's input in a call, and not in generation."""
    model = trained(ours(t5, "MultitaskPromptTuningConfig", "SEQ_2_SEQ_LM", **TASKS))
    own, ids = {"task_ids": torch.tensor([2, 0])}, torch.zeros(2, 1, dtype=torch.long)
    for _ in range(3):
        ids = torch.cat([ids, model(input_ids=IDS, decoder_input_ids=ids, **own).logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert model.generate(input_ids=IDS, **settings, **own).tolist() == ids.tolist()
    assert model.generate(input_ids=IDS, num_beams=2, **settings, **own).shape == (2, 4)


# CPT


def cpt(**fields):
    return ours(llama, "CPTConfig", TASK, num_virtual_tokens=9, **EXAMPLES, **fields)


def test_tokens_move_within_their_bounds():
    model = cpt(opt_projection_epsilon=0.5, opt_projection_format_epsilon=0.2)
    encoder = model.prompt_encoder["default"]
    start = model.word_embeddings.weight[torch.tensor(EXAMPLES["cpt_token_ids"])]
    assert torch.equal(encoder.rows(), start)
    optimiser = torch.optim.SGD(encoder.parameters(), 1e4)
    model(input_ids=IDS, labels=IDS).loss.backward()
    kinds = torch.tensor(EXAMPLES["cpt_tokens_type_mask"]) % 4
    assert (encoder.delta_embedding.weight.grad.abs().sum(1) > 0).tolist() == (kinds != 0).tolist()
    optimiser.step()
    moved = (graftlet.get_peft_model_state_dict(model)["prompt_embeddings"] - start).norm(dim=1)
    bounds = torch.tensor([0.0, 0.2, 0.5, 0.2])[kinds] * (8 / 2048) ** 0.5
    torch.testing.assert_close(moved, bounds, rtol=1e-3, atol=1e-6)
    model(input_ids=IDS)
    torch.testing.assert_close(encoder.delta_embedding.weight.norm(dim=1), bounds, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_input_types_choose_what_counts(factor):
    types = torch.tensor([[1, 2, 3, 3, 4], [0, 1, 2, 4, 8]])
    fields = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": factor}
    mine, theirs = both(llama, "CPTConfig", TASK, num_virtual_tokens=9, **EXAMPLES, **fields)
    before = types.clone()
    loss = mine(input_ids=IDS, labels=IDS, input_type_mask=types).loss
    assert torch.equal(types, before)
    torch.testing.assert_close(loss, theirs(input_ids=IDS, labels=IDS, input_type_mask=types).loss)


def test_the_examples_labels_count_too():
    model = cpt(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    output = model(input_ids=IDS, labels=IDS)
    each = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2),
        torch.cat([torch.tensor(EXAMPLES["cpt_token_ids"]).expand(2, -1), IDS], 1)[:, 1:],
        reduction="none",
    )
    weights = torch.tensor([0, 0, 0, 0.25, 0, 0, 0, 0.5, 1, 1, 1, 1, 1])
    torch.testing.assert_close(output.loss, (each * weights).sum() / (2 * 7))


def test_an_unfinished_example_leaves_the_inputs_labels_labels():
    """The reference counts on from the last type as it is, so that labels turn into templates and the loss into NaN."""
    model = ours(llama, "CPTConfig", TASK, num_virtual_tokens=2, cpt_token_ids=[1, 2])
    output = model(input_ids=IDS, labels=IDS)
    plain = torch.nn.functional.cross_entropy(output.logits[:, 1:-1].flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(output.loss, plain)


def test_a_loss_is_its_own_adapters(tmp_path):
    model = cpt()
    expected = model(input_ids=IDS, labels=IDS).loss
    fields = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
    model.add_adapter("other", graftlet.CPTConfig(task_type=TASK, **EXAMPLES, **fields))
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)
    model.set_adapter("other")
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, cpt(**fields)(input_ids=IDS, labels=IDS).loss)
    assert not model.prompt_encoder["other"].embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        ({"cpt_mask": [1]}, "one each"),
        ({"cpt_tokens_type_mask": [1]}, "one each"),
        ({"cpt_tokens_type_mask": [1, -1]}, "start from 0"),
        ({"num_virtual_tokens": 3}, "leave it out"),
        ({"cpt_token_ids": []}, "one token at least"),
        ({"opt_weighted_loss_type": "linear"}, "allowed"),
        ({"opt_projection_epsilon": -1.0}, "cannot be negative"),
    ],
)
def test_wrong_examples_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        graftlet.CPTConfig(**{"task_type": TASK, "cpt_token_ids": [1, 2], **fields})


# cartridges, and prefixes out of caches


class Words:
    """A tokenizer of letters."""

    def __call__(self, text, truncation=False, max_length=None):
        ids = [ord(letter) % 11 for letter in text]
        return {"input_ids": ids[:max_length] if truncation else ids}


class Chat(Words):
    def apply_chat_template(self, messages, tokenize, add_generation_prompt, return_dict):
        return [1, *self(messages[0]["content"])["input_ids"], 2]


def test_only_the_later_tokens_of_a_cartridge_learn():
    model = ours(llama, "CartridgeConfig", TASK, num_frozen_tokens=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    encoder = model.prompt_encoder["default"]
    assert encoder.frozen_embedding.grad is None
    assert encoder.trainable_embedding.grad.any()
    model.set_requires_grad("default", True)
    assert not encoder.frozen_embedding.requires_grad


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["CartridgeConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("words", [Words(), Chat()], ids=["plain", "chat"])
def test_a_text_in_the_cache_is_the_text_before_the_input(make, kind, words):
    model = ours(make, kind, TASK, num_virtual_tokens=4)
    rows = graftlet.initialize_kv_prefix_from_text(model, words, text="hello there")
    assert torch.equal(model.prompt_encoder["default"].rows(), rows)
    ids = graftlet.model.kv_prefix.text_ids(words, "hello there", True, None)[:4]
    whole = torch.cat([torch.tensor([ids, ids]), IDS], 1)
    torch.testing.assert_close(model(input_ids=IDS).logits, model.get_base_model()(input_ids=whole).logits[:, 4:])


def test_rows_of_a_cache_are_the_references():
    peft = pytest.importorskip("peft")
    base = llama().eval()
    cache = base(input_ids=IDS[:1], use_cache=True)["past_key_values"]
    ours_, theirs = (
        library.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3) for library in (graftlet, peft)
    )
    assert torch.equal(ours_, theirs)


def test_a_window_keeps_what_it_needs():
    """A layer with a window forgets the first tokens, which no later one looks at."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = ours(lambda: Gemma3ForCausalLM(config), "CartridgeConfig", TASK, num_virtual_tokens=6)
    graftlet.initialize_kv_prefix_from_text(model, Words(), text="hello there")
    ids = torch.tensor([Words()("hello ")["input_ids"]])
    whole = torch.cat([ids.expand(2, -1), IDS], 1)
    torch.testing.assert_close(model(input_ids=IDS).logits, model.get_base_model()(input_ids=whole).logits[:, 6:])
    cache = model.get_base_model()(input_ids=whole[:1], use_cache=True)["past_key_values"]
    with pytest.raises(CallError, match="window"):
        graftlet.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def test_wrong_starts_are_refused():
    model = ours(llama, "CartridgeConfig", TASK)
    before = model.prompt_encoder["default"].rows().detach().clone()
    cache = model.get_base_model()(input_ids=IDS, use_cache=True)["past_key_values"]
    for match, start in {
        "of 2 sequences": lambda: graftlet.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache),
        "has 2 tokens": lambda: graftlet.initialize_kv_prefix_from_text(model, Words(), text="hi"),
        "0 layers": lambda: graftlet.initialize_kv_prefix_from_past_key_values(model, past_key_values=()),
        "holds no keys": lambda: graftlet.prompt_embeddings_from_past_key_values((), num_virtual_tokens=1),
    }.items():
        with pytest.raises(CallError, match=match):
            start()
    with pytest.raises(ConfigError, match="has 3"):
        graftlet.initialize_kv_prefix_from_text(model, Words(), text="hello", num_virtual_tokens=2)
    assert torch.equal(model.prompt_encoder["default"].rows(), before)
    with pytest.raises(ConfigError, match="does not live in the cache"):
        graftlet.initialize_kv_prefix_from_text(ours(llama, "PromptTuningConfig", TASK), Words(), text="hello")
    model = ours(llama, "PrefixTuningConfig", TASK, prefix_projection=True)
    with pytest.raises(ConfigError, match="network"):
        graftlet.initialize_kv_prefix_from_text(model, Words(), text="hello")
    model = ours(t5, "CartridgeConfig", "SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        graftlet.initialize_kv_prefix_from_text(model, Words(), text="hello")


@pytest.mark.parametrize("safe", [True, False])
def test_cartridges_one_behind_the_other(safe, tmp_path):
    peft = pytest.importorskip("peft")
    for name, tokens in (("a", 3), ("b", 2)):
        model = ours(llama, "CartridgeConfig", TASK, num_virtual_tokens=tokens)
        model.save_pretrained(tmp_path / name)
    parts = [tmp_path / "a", tmp_path / "b"]
    for library, name in ((graftlet, "ours"), (peft, "theirs")):
        library.compose_cartridge_adapters(parts, output_path=tmp_path / name, safe_serialization=safe)
    made = [graftlet.load_peft_weights(tmp_path / name, allow_pickle=True) for name in ("ours", "theirs")]
    assert torch.equal(made[0]["prompt_embeddings"], made[1]["prompt_embeddings"])
    config = graftlet.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (5, 1)
    whole = graftlet.PeftModel.from_pretrained(llama(), tmp_path / "ours", allow_pickle=True)
    assert torch.equal(whole.prompt_encoder["default"].rows(), made[0]["prompt_embeddings"])


def test_what_cannot_be_composed_is_refused(tmp_path):
    ours(llama, "CartridgeConfig", TASK).save_pretrained(tmp_path / "a")
    ours(gpt2, "CartridgeConfig", TASK).save_pretrained(tmp_path / "b")
    ours(llama, "PromptTuningConfig", TASK).save_pretrained(tmp_path / "c")
    for names, match in ((["a"], "two at least"), (["a", "b"], "token_dim is 8"), (["a", "c"], "does not live")):
        with pytest.raises(ConfigError, match=match):
            graftlet.compose_cartridge_adapters([tmp_path / n for n in names], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_numbers_of_frozen_tokens_are_refused():
    for frozen, match in ((-1, "negative"), (4, "at most all")):
        with pytest.raises(ConfigError, match=match):
            graftlet.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=frozen)


def test_labels_as_inputs_are_the_references():
    peft = pytest.importorskip("peft")
    labels = torch.tensor([[4, -100, 6], [7, 8, -100]])
    assert torch.equal(graftlet.shift_tokens_right(labels, 0, 1), peft.shift_tokens_right(labels, 0, 1))
    with pytest.raises(CallError, match="pad_token_id"):
        graftlet.shift_tokens_right(labels, None, 1)
