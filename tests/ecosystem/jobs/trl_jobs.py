# SPDX-License-Identifier: Apache-2.0
"""TRL: its trainers with `peft_config=`, on data in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import causal, files, learning, losses, output, sentences, shake, tensors, tokenizer

COMMON = {
    "max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "seed": 3, "use_cpu": True, "bf16": False, "save_steps": 5,
}  # fmt: skip


def _lora(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


def _run(made, folder: Path, *logged: str) -> dict:
    """Train, save, load; what came of it."""
    from peft import PeftModel

    shake(made.model)
    learns = learning(made.model)
    made.train()
    made.save_model(folder / "saved")
    seen = {"class": type(made.model).__name__, "learns": learns, "losses": losses(made)}
    for name in logged:
        seen[name] = [entry[name] for entry in made.state.log_history if name in entry]
    seen["checkpoints"] = [f for f in files(folder) if "adapter" in f]
    seen["tensors"] = tensors(folder / "saved" / "adapter_model.safetensors")
    seen["output"] = output(made.model)
    seen["loaded"] = output(PeftModel.from_pretrained(causal(), folder / "saved"))
    return seen


def sft(folder: Path) -> dict:
    """SFTTrainer with peft_config."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = SFTTrainer(
        model=causal(),
        args=SFTConfig(str(folder), max_length=16, gradient_checkpointing=False, **COMMON),
        train_dataset=Dataset.from_dict({"text": sentences(40)}),
        processing_class=tokenizer(),
        peft_config=_lora(),
    )
    return _run(made, folder)


def sft_of_everything(folder: Path) -> dict:
    """SFTTrainer with all linear layers, a head trained whole, gradient checkpointing, chats, packing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in _pairs(40)]
    made = SFTTrainer(
        model=causal(),
        args=SFTConfig(str(folder), max_length=32, packing=True, gradient_checkpointing=True, **COMMON),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer(),
        peft_config=_lora(target_modules="all-linear", modules_to_save=["lm_head"], use_rslora=True),
    )
    return _run(made, folder)


def sft_of_a_peft_model(folder: Path) -> dict:
    """SFTTrainer on a PeftModel that was made before, with an evaluation, resumed from a checkpoint."""
    from datasets import Dataset
    from peft import get_peft_model
    from trl import SFTConfig, SFTTrainer

    def made(steps):
        return SFTTrainer(
            model=get_peft_model(causal(), _lora(use_dora=True)),
            args=SFTConfig(
                str(folder), max_length=16, eval_strategy="steps", eval_steps=5, **{**COMMON, "max_steps": steps}
            ),
            train_dataset=Dataset.from_dict({"text": sentences(40)}),
            eval_dataset=Dataset.from_dict({"text": sentences(8, 9)}),
            processing_class=tokenizer(),
        )

    first = made(5)
    shake(first.model)
    first.train()
    second = made(10)
    second.train(resume_from_checkpoint=True)
    return {
        "losses": losses(second),
        "evaluated": [e["eval_loss"] for e in second.state.log_history if "eval_loss" in e],
        "output": output(second.model),
    }


def sft_of_a_prompt(folder: Path) -> dict:
    """SFTTrainer with prompt tuning."""
    from datasets import Dataset
    from peft import PromptTuningConfig
    from trl import SFTConfig, SFTTrainer

    made = SFTTrainer(
        model=causal(),
        args=SFTConfig(str(folder), max_length=16, gradient_checkpointing=False, **COMMON),
        train_dataset=Dataset.from_dict({"text": sentences(40)}),
        processing_class=tokenizer(),
        peft_config=PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    )
    shake(made.model, mark="prompt_encoder")
    made.train()
    return {"losses": losses(made), "learns": learning(made.model), "output": output(made.model)}


def dpo(folder: Path) -> dict:
    """DPOTrainer: the model without its adapter is the reference."""
    from trl import DPOConfig, DPOTrainer

    made = DPOTrainer(
        model=causal(),
        args=DPOConfig(str(folder), max_length=32, gradient_checkpointing=False, **COMMON),
        train_dataset=_preferences(),
        processing_class=tokenizer(),
        peft_config=_lora(),
    )
    return _run(made, folder, "rewards/chosen", "rewards/rejected", "rewards/margins")


def dpo_of_an_adapter(folder: Path) -> dict:
    """DPOTrainer on a PeftModel: its adapter as it was is the reference, kept as another adapter."""
    from peft import get_peft_model
    from trl import DPOConfig, DPOTrainer

    model = get_peft_model(causal(), _lora())
    shake(model)
    made = DPOTrainer(
        model=model,
        args=DPOConfig(str(folder), max_length=32, gradient_checkpointing=False, **COMMON),
        train_dataset=_preferences(),
        processing_class=tokenizer(),
    )
    seen = {"adapters": sorted(made.model.peft_config), "learns": learning(made.model)}
    made.train()
    seen |= {"losses": losses(made), "output": output(made.model)}
    seen["margins"] = [e["rewards/margins"] for e in made.state.log_history if "rewards/margins" in e]
    return seen


def reward(folder: Path) -> dict:
    """RewardTrainer: a classifier with a head of its own."""
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = causal().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    made = RewardTrainer(
        model=model,
        args=RewardConfig(str(folder), max_length=32, gradient_checkpointing=False, **COMMON),
        train_dataset=_preferences(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
        ),
    )
    shake(made.model)
    made.train()
    made.save_model(folder / "saved")
    return {
        "losses": losses(made),
        "learns": learning(made.model),
        "output": output(made.model),
        "tensors": tensors(folder / "saved" / "adapter_model.safetensors"),
    }


def grpo(folder: Path) -> dict:
    """GRPOTrainer: generation, rewards by a function, the adapter off as the reference."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def short(completions, **_):
        return [float(-len(text)) for text in completions]

    settings = {**COMMON, "max_steps": 4, "save_steps": 2}
    made = GRPOTrainer(
        model=causal(),
        reward_funcs=short,
        args=GRPOConfig(
            str(folder), num_generations=4, max_completion_length=6, beta=0.1, gradient_checkpointing=False, **settings
        ),
        train_dataset=Dataset.from_dict({"prompt": sentences(16)}),
        processing_class=tokenizer(),
        peft_config=_lora(),
    )
    return _run(made, folder, "reward", "kl")


def _pairs(count: int) -> list[tuple[str, str]]:
    return list(zip(sentences(count, 1), sentences(count, 2), strict=True))


def _preferences():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": sentences(40, 1), "chosen": sentences(40, 2), "rejected": sentences(40, 3)})


JOBS = [sft, sft_of_everything, sft_of_a_peft_model, sft_of_a_prompt, dpo, dpo_of_an_adapter, reward, grpo]
