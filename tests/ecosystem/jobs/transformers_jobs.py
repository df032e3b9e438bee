# SPDX-License-Identifier: Apache-2.0
"""transformers: a model's own ways to adapters, and the Trainer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tiny import batch, causal, files, learning, losses, output, sentences, shake, tensors, tokenizer


def add_set_disable(folder: Path) -> dict:
    """add_adapter, set_adapter, disable_adapters, enable_adapters, active_adapters, delete_adapter."""
    from peft import LoraConfig

    model = causal()
    base = output(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "one")
    model.add_adapter(LoraConfig(r=2, lora_alpha=32, target_modules="all-linear"), "two")
    shake(model)
    seen = {"active": model.active_adapters(), "learns": learning(model)}
    for names in ("one", "two", ["one", "two"]):
        model.set_adapter(names)
        seen[f"output of {names}"] = output(model)
        seen[f"learns with {names}"] = learning(model)
    model.set_adapter("two")
    model.disable_adapters()
    seen["disabled is the base"] = torch.equal(output(model), base)
    model.enable_adapters()
    seen["enabled again"] = output(model)
    seen["state"] = sorted(model.get_adapter_state_dict("two"))
    model.delete_adapter("two")
    seen["left"] = sorted(model.peft_config)
    seen["output of what is left"] = output(model)
    return seen


def errors(folder: Path) -> dict:
    """What goes wrong says so by the same classes of errors."""
    from peft import LoraConfig

    seen = {}

    def attempt(name, action):
        try:
            action()
            seen[name] = "nothing"
        except Exception as error:
            seen[name] = next(k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins")

    model = causal()
    attempt("no adapter yet", lambda: model.set_adapter("one"))
    attempt("no module", lambda: causal().add_adapter(LoraConfig(target_modules=["nothing"]), "one"))
    attempt("no config", lambda: model.add_adapter({"r": 4}, "two"))
    model = causal()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    attempt("name taken", lambda: model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one"))
    attempt("name unknown", lambda: model.set_adapter("two"))
    attempt("rank", lambda: LoraConfig(r=0, target_modules=["q_proj"]) and causal().add_adapter(LoraConfig(r=0)))
    attempt("no folder", lambda: model.load_adapter(str(folder / "nowhere"), "three"))
    return seen


def save_and_load(folder: Path) -> dict:
    """save_pretrained writes the adapter; load_adapter and from_pretrained read it."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = causal()
    model.save_pretrained(folder / "base")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    shake(model)
    model.save_pretrained(folder / "adapter")
    seen = {"files": files(folder / "adapter"), "tensors": tensors(folder / "adapter" / "adapter_model.safetensors")}
    seen["output"] = output(model)
    other = causal()
    other.load_adapter(str(folder / "adapter"), "other")
    seen["loaded"] = output(other)
    seen["learns"] = learning(other)
    other.load_adapter(str(folder / "adapter"), "again", is_trainable=True)
    seen["active"] = other.active_adapters()
    from safetensors.torch import load_file

    third = causal()
    held = load_file(folder / "adapter" / "adapter_model.safetensors")
    third.load_adapter(adapter_state_dict=held, peft_config=other.peft_config["other"])
    seen["loaded from a dictionary"] = output(third)
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder / "adapter")
    config.base_model_name_or_path = str(folder / "base")
    config.save_pretrained(folder / "adapter")
    seen["from_pretrained of the adapter"] = output(AutoModelForCausalLM.from_pretrained(folder / "adapter"))
    return seen


def token_rows(folder: Path) -> dict:
    """An adapter with rows of the embedding, saved and loaded by transformers."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]})
    model = causal()
    model.add_adapter(config)
    shake(model)
    shake(model, 6, "trainable_tokens_delta")
    model.save_pretrained(folder)
    other = causal()
    other.load_adapter(str(folder), "other")
    return {
        "output": output(model),
        "loaded": output(other),
        "tensors": tensors(folder / "adapter_model.safetensors"),
    }


def other_methods(folder: Path) -> dict:
    """Methods beside LoRA, added, saved and loaded by transformers."""
    import peft

    seen = {}
    targets = {"target_modules": ["q_proj", "v_proj"]}
    made = {
        "ia3": peft.IA3Config(**targets, feedforward_modules=[], init_ia3_weights=False),
        "loha": peft.LoHaConfig(r=2, **targets, init_weights=False),
        "lokr": peft.LoKrConfig(r=2, **targets, init_weights=False),
        "hra": peft.HRAConfig(r=2, **targets, init_weights=False),
        "ln_tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "dora": peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **targets),
    }
    for name, config in made.items():
        model = causal()
        torch.manual_seed(3)
        model.add_adapter(config, name)
        model.save_pretrained(folder / name)
        other = causal()
        other.load_adapter(str(folder / name), name)
        seen[name] = output(model)
        seen[f"{name}, loaded"] = output(other)
        other.disable_adapters()
        seen[f"{name}, disabled"] = output(other)
    return seen


def hotswap(folder: Path) -> dict:
    """enable_peft_hotswap and load_adapter in the place of another."""
    from peft import LoraConfig

    for n, rank in enumerate((4, 4)):
        model = causal()
        model.add_adapter(LoraConfig(r=rank, lora_alpha=8 * (n + 1), target_modules=["q_proj", "v_proj"]))
        shake(model, n)
        model.save_pretrained(folder / str(n))
    seen = {"second": output(model)}
    model = causal()
    model.enable_peft_hotswap(target_rank=4)
    model.load_adapter(str(folder / "0"), "default")
    seen["first"] = output(model)
    model.load_adapter(str(folder / "1"), "default", hotswap=True)
    seen["swapped"] = output(model)
    return seen


def _data():
    tokens = tokenizer()
    rows = [tokens(text, padding="max_length", max_length=10, truncation=True) for text in sentences(40)]
    return [{**row, "labels": row["input_ids"]} for row in rows]


def _trainer(model, folder: Path, **settings):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_steps=5,
        report_to=[], seed=3, use_cpu=True, **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=_data(), eval_dataset=_data()[:8])


def trainer(folder: Path) -> dict:
    """Ten steps with a PeftModel, evaluated, saved, resumed after five, the best loaded at the end."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def made():
        model = causal()
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        shake(model)
        return model

    first = _trainer(made(), folder / "run", eval_strategy="steps", eval_steps=5, load_best_model_at_end=True)
    first.train()
    seen = {"losses": losses(first), "files": [f for f in files(folder / "run") if "adapter" in f]}
    seen["evaluated"] = first.evaluate()["eval_loss"]
    seen["output"] = output(first.model)
    shutil.rmtree(folder / "run" / "checkpoint-10")
    seen["learns at the end"] = learning(first.model)
    again = _trainer(made(), folder / "run")
    again.train(resume_from_checkpoint=True)
    seen["losses, resumed"] = losses(again)
    seen["output, resumed"] = output(again.model)
    again.save_model(folder / "saved")
    seen["tensors"] = tensors(folder / "saved" / "adapter_model.safetensors")
    seen["loaded"] = output(PeftModel.from_pretrained(causal(), folder / "saved"))
    return seen


def trainer_of_an_injected_model(folder: Path) -> dict:
    """Ten steps with add_adapter and gradient checkpointing, no PeftModel."""
    from peft import LoraConfig

    model = causal()
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    shake(model)
    first = _trainer(model, folder, gradient_checkpointing=True)
    first.train()
    first.save_model(folder / "saved")
    return {
        "losses": losses(first),
        "output": output(first.model),
        "tensors": tensors(folder / "saved" / "adapter_model.safetensors"),
    }


def classifier(folder: Path) -> dict:
    """A classifier whose head is trained along, saved and loaded."""
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        num_labels=3,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"]))
    shake(model)
    data = [{**row, "labels": n % 3} for n, row in enumerate(_data())]
    for row in data:
        row.pop("token_type_ids", None)
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=10, learning_rate=1e-2, logging_steps=1, report_to=[], seed=3, use_cpu=True
    )
    first = Trainer(model=model, args=arguments, train_dataset=data)
    first.train()
    first.save_model(folder / "saved")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder / "saved", num_labels=3)
    return {
        "class": type(model).__name__,
        "losses": losses(first),
        "output": output(model),
        "loaded": output(loaded),
        "tensors": tensors(folder / "saved" / "adapter_model.safetensors"),
    }


def generation(folder: Path) -> dict:
    """generate with adapters on layers, with prompts, and a pipeline around a PeftModel."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import pipeline

    seen = {}
    task = {"task_type": "CAUSAL_LM"}
    for config in (
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **task),
        PromptTuningConfig(num_virtual_tokens=3, **task),
        PrefixTuningConfig(num_virtual_tokens=3, **task),
    ):
        model = causal()
        torch.manual_seed(4)
        model = get_peft_model(model, config).eval()
        name = type(config).__name__
        seen[name] = model.generate(**batch(), max_new_tokens=6, do_sample=False).tolist()
        seen[f"{name}, beams"] = model.generate(**batch(), max_new_tokens=5, do_sample=False, num_beams=3).tolist()
        with model.disable_adapter():
            seen[f"{name}, disabled"] = model.generate(**batch(), max_new_tokens=6, do_sample=False).tolist()
        if isinstance(config, LoraConfig):
            writer = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
            seen["pipeline"] = writer("the cat sees", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    return seen


def experts(folder: Path) -> dict:
    """An adapter with a pair an expert, made before experts were fused, loaded onto a Mixtral by transformers and peft."""
    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    def base():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
                num_key_value_heads=2, num_local_experts=4, initializer_range=0.3,
            )
        )  # fmt: skip

    LoraConfig(r=2, target_modules=["gate", "q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(folder)
    sizes = {"self_attn.q_proj": (16, 16), "block_sparse_moe.gate": (16, 4)}
    for number in range(4):
        place = f"block_sparse_moe.experts.{number}"
        sizes |= {f"{place}.w1": (16, 24), f"{place}.w2": (24, 16), f"{place}.w3": (16, 24)}
    draw, pairs = torch.Generator().manual_seed(0), {}
    for name, (wide, out) in sizes.items():
        pairs[f"base_model.model.model.layers.0.{name}.lora_A.weight"] = torch.randn(2, wide, generator=draw)
        pairs[f"base_model.model.model.layers.0.{name}.lora_B.weight"] = torch.randn(out, 2, generator=draw)
    save_file(pairs, folder / "adapter_model.safetensors")
    model = base()
    model.load_adapter(str(folder))
    seen = {"base": output(base()), "loaded by transformers": output(model)}
    seen["loaded by peft"] = output(PeftModel.from_pretrained(base(), folder))
    seen["keys"] = sorted(model.get_adapter_state_dict())
    return seen


JOBS = [
    add_set_disable, errors, save_and_load, token_rows, other_methods, hotswap, trainer, trainer_of_an_injected_model,
    classifier, generation, experts,
]  # fmt: skip
