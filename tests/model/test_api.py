# SPDX-License-Identifier: Apache-2.0
"""The public API on whole models: adding, switching, saving, merging, generating, counting."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graftlet
from graftlet import LoraConfig, PeftConfig, PeftModel, get_peft_model
from graftlet.errors import CardWarning, HeadWarning, MergeWarning

IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 8, 7, 6, 5]])


def llama(**kw):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **kw)).eval()


def gpt2():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def bert():
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def t5():
    config = T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def lora(**fields):
    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, **fields})


def logits(model, **kw):
    with torch.no_grad():
        return model(input_ids=IDS, **kw).logits


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"bias": "lora_only", "target_modules": ["c_attn"]}], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_layers_and_keys_are_the_references(make, fields):
    peft = pytest.importorskip("peft")
    if fields.get("target_modules") and make is not gpt2:
        fields = {"bias": "lora_only"}
    task = {bert: "SEQ_CLS", t5: "SEQ_2_SEQ_LM"}.get(make, "CAUSAL_LM")
    base = make()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, task_type=task, **fields))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, task_type=task, **fields))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    learn = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert learn[0] == learn[1]
    a, b = graftlet.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    doubled = ("original_module", "modules_to_save")  # a head's bias, which the reference writes three times
    b = {k: v for k, v in b.items() if not any(d in k for d in doubled)}
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "mlp.down_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": r".*layers\.1.*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"1\..*q_proj": 5}},
    ],
    ids=str,
)
def test_targeting_is_the_references(fields):
    peft = pytest.importorskip("peft")
    base = llama()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **fields))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **fields))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    scales = [
        {n: m.scaling["default"] for n, m in x.named_modules() if isinstance(vars(m).get("scaling"), dict)}
        for x in (ours, theirs)
    ]
    assert scales[0] == scales[1]


def test_training_moves_the_adapter_and_nothing_else():
    model = get_peft_model(llama(), lora(init_lora_weights=True)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}


def test_save_load_add_switch_delete(tmp_path):
    model = get_peft_model(llama(), lora())
    first = logits(model)
    model.add_adapter("second", lora(r=3))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 3
    fresh = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(fresh), first)
    result = fresh.load_adapter(tmp_path / "second", "two")
    assert result == ([], [])
    assert fresh.active_adapters == ["default"]
    fresh.set_adapter(["default", "two"])
    both = logits(fresh)
    assert not torch.equal(both, first)
    fresh.set_adapter("two")
    assert torch.equal(logits(fresh), second)
    fresh.delete_adapter("two")
    assert fresh.active_adapters == ["default"]
    assert torch.equal(logits(fresh), first)


def test_what_learns_after_each_step(tmp_path):
    def learning(model):
        return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}

    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora())
    assert learning(model) == {"default"}
    model.set_adapter("b")
    assert learning(model) == {"b"}
    with model.disable_adapter():
        pass
    assert learning(model) == {"b"}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "frozen")
    assert learning(model) == {"b"}
    model.set_requires_grad("frozen")
    assert learning(model) == {"b", "frozen"}
    assert learning(PeftModel.from_pretrained(llama(), tmp_path)) == set()
    assert learning(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)) == {"default"}


def test_merge_unmerge_and_disable():
    model = get_peft_model(llama(), lora())
    bits = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    adapted = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(llama()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model), adapted)
    with pytest.warns(MergeWarning, match="merged already"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters() if n in bits)
    with pytest.warns(MergeWarning, match="no adapter is merged"):
        model.unmerge_adapter()


def test_merging_one_of_two_leaves_the_other_acting():
    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora())
    model.set_adapter(["default", "b"])
    both = logits(model)
    model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), both)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both)


def test_merge_and_unload_gives_an_ordinary_model(tmp_path):
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    adapted = logits(model)
    merged = model.merge_and_unload(progressbar=True)
    assert type(merged) is LlamaForCausalLM
    assert set(merged.state_dict()) == set(llama().state_dict())
    torch.testing.assert_close(logits(merged), adapted)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), adapted)


def test_mixed_batches_and_beams():
    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora())
    alone = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    for rows in (["b", "default"], ["__base__", "b"]):
        mixed = logits(model, adapter_names=rows)
        for i, name in enumerate(rows):
            torch.testing.assert_close(mixed[i], alone[name][i])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2, "eos_token_id": None}
    mixed = model.generate(input_ids=IDS, adapter_names=["b", "default"], **settings)
    model.set_adapter("b")
    assert model.generate(input_ids=IDS[:1], **settings)[0].tolist() == mixed[0].tolist()


def test_mixed_batches_in_an_encoder_decoder():
    torch.manual_seed(0)
    model = get_peft_model(t5(), lora(task_type="SEQ_2_SEQ_LM"))
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    mixed = model.generate(input_ids=IDS, adapter_names=["__base__", "default"], **settings)
    assert model.generate(input_ids=IDS[1:], **settings)[0].tolist() == mixed[1].tolist()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(), lora()).train()
        if checkpointing:
            options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            model.get_base_model().gradient_checkpointing_enable(**options)
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_remembers_each_rows_adapter(reentrant):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(), lora()).train()
        model.add_adapter("b", lora())
        model.set_requires_grad("b")
        if checkpointing:
            options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            model.get_base_model().gradient_checkpointing_enable(**options)
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, adapter_names=["b", "default"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("name", ["0", "weight", "lora_A", "keys", "ünïcode", "with space"])
def test_any_name_that_is_a_folder_will_do(name, tmp_path):
    model = get_peft_model(llama(), lora(), adapter_name=name)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(fresh), adapted)


def test_compiled_models_save_plain_keys(tmp_path):
    model = get_peft_model(llama(), lora())
    compiled = torch.compile(model, backend="eager")
    assert set(graftlet.get_peft_model_state_dict(compiled)) == set(graftlet.get_peft_model_state_dict(model))
    around = get_peft_model(torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"), lora(target_modules=["0"]))
    assert not any("_orig_mod" in key for key in graftlet.get_peft_model_state_dict(around))


def test_half_precision_adapters_are_kept_in_single():
    for keep, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(llama().bfloat16(), lora(), autocast_adapter_dtype=keep)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}
        assert logits(model).dtype == torch.bfloat16


def test_status_is_the_references():
    peft = pytest.importorskip("peft")
    status = []
    for library in (graftlet, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(r=2, task_type="CAUSAL_LM"))
        model.add_adapter("b", library.LoraConfig(r=2))
        model.merge_adapter(["b"])
        whole, layers = vars(model.get_model_status()), [vars(s) for s in model.get_layer_status()]
        status.append((whole, layers))
    assert status[0] == status[1]


def test_counting_prints_the_references_line(capsys):
    peft = pytest.importorskip("peft")
    for library in (graftlet, peft):
        library.get_peft_model(llama(), library.LoraConfig(r=2, task_type="CAUSAL_LM")).print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.strip().splitlines()
    assert ours == theirs


def test_auto_classes_bring_the_base_along(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora())
    adapted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    for kind in (graftlet.AutoPeftModelForCausalLM, graftlet.AutoPeftModel):
        assert torch.equal(logits(kind.from_pretrained(tmp_path / "adapter").eval()), adapted)
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        graftlet.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_nothing_is_imported_because_a_file_names_it(tmp_path, monkeypatch):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    (tmp_path / "evilmod.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    config["auto_mapping"] = {"base_model_class": "X", "parent_library": "evilmod"}
    config["base_model_name_or_path"] = "somewhere"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="import_allowlist"):
        graftlet.AutoPeftModel.from_pretrained(tmp_path)


def test_cards_are_written_updated_and_never_in_the_way(tmp_path):
    model = get_peft_model(llama(), lora())
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "library_name: peft" in card.read_text()
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n")
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert "# Mine" in text
    assert "license: mit" in text
    assert "lora" in text
    card.write_text("---\n: [broken\n---\nhand-written")
    with pytest.warns(CardWarning):
        model.save_pretrained(tmp_path)
    assert card.read_text().endswith("hand-written")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_push_to_hub_uploads_the_folder(monkeypatch):
    import huggingface_hub

    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls["repo"] = (repo_id, private)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kw):
            from pathlib import Path

            calls["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    get_peft_model(llama(), lora()).push_to_hub("me/adapter", token="t", private=True)
    assert calls["repo"] == ("me/adapter", True)
    assert calls["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_preparing_and_casting_are_the_references():
    peft = pytest.importorskip("peft")
    made = []
    for library in (graftlet, peft):
        model = llama().bfloat16()
        model.is_loaded_in_8bit = True
        model = library.prepare_model_for_kbit_training(model)
        dtypes = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        model = library.get_peft_model(model, library.LoraConfig(r=2, task_type="CAUSAL_LM"))
        library.cast_mixed_precision_params(model, torch.float16)
        made.append((dtypes, {n: p.dtype for n, p in model.named_parameters()}, model.model.training))
    assert made[0] == made[1]


def test_a_forgotten_task_type_is_said():
    with pytest.warns(HeadWarning, match="SEQ_CLS"):
        get_peft_model(bert(), LoraConfig(target_modules=["query"]))


def test_inject_in_place_and_from_a_state_dict():
    model = llama()
    injected = graftlet.inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert injected is model
    tensors = graftlet.get_peft_model_state_dict(model)
    assert set(tensors) == {f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    one = {k: v for k, v in tensors.items() if ".0." in k}
    other = graftlet.inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), llama(), state_dict=one)
    assert set(graftlet.get_peft_model_state_dict(other)) == set(one)


def test_a_config_of_any_class_reads_any_method(tmp_path):
    graftlet.IA3Config(target_modules=["a"], feedforward_modules=[]).save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is graftlet.IA3Config
    assert type(LoraConfig.from_pretrained(tmp_path)) is graftlet.IA3Config


def test_plain_modules_need_no_transformers(tmp_path):
    """In a process in which transformers cannot be imported: adapt, train, save, load, merge."""
    script = f"""
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("transformers", "accelerate", "peft"):
                    raise ImportError(name + " is blocked")
        sys.meta_path.insert(0, Block())
        import torch
        from torch import nn
        import graftlet
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        state = {{k: v.clone() for k, v in base.state_dict().items()}}
        model = graftlet.get_peft_model(base, graftlet.LoraConfig(target_modules=["0", "2"]))
        x = torch.randn(3, 4)
        model(x).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        y = model(x)
        model.save_pretrained({str(tmp_path)!r})
        fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        fresh.load_state_dict(state)
        loaded = graftlet.PeftModel.from_pretrained(fresh, {str(tmp_path)!r})
        assert torch.equal(loaded(x), y)
        assert torch.allclose(loaded.merge_and_unload()(x), y, atol=1e-6)
        assert "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_what_layers_share_learns_with_its_adapter() -> None:
    config = {"target_modules": ["q_proj"], "r": 2, "num_vectors": 6, "vector_length": 2, "topk": 2}
    model = graftlet.get_peft_model(llama(), graftlet.VBLoRAConfig(**config))
    model.add_adapter("other", graftlet.VBLoRAConfig(**config))
    model.set_adapter("other")
    banks = {name: t.requires_grad for name, t in model.named_parameters() if "vector_bank" in name}
    assert sorted(banks.values()) == [False, True]
    assert all(learns == name.endswith("other") for name, learns in banks.items())
