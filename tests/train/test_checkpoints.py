# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with the mixin: it finds columns and labels, saves adapters alone, resumes, evaluates, pushes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import graftlet
from graftlet.files import read_tensors
from graftlet.integrations import AdapterCheckpoints


class Trained(AdapterCheckpoints, Trainer):
    """What a user writes."""


def model() -> Any:
    """A classifier whose head learns beside its adapter."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2, num_labels=2))
    return graftlet.get_peft_model(base, graftlet.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))


def rows(count: int = 16) -> Any:
    from datasets import Dataset

    ids = torch.arange(3 * count).reshape(count, 3) % 20
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": [i % 2 for i in range(count)], "note": ["x"] * count}
    )


def trainer(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trained:
    args = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, logging_steps=1, learning_rate=0.01, use_cpu=True, report_to="none",
        disable_tqdm=True, per_device_train_batch_size=4, **changes,
    )  # fmt: skip
    return Trained(model=model(), args=args, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "adapter_model.safetensors")


def test_columns_and_labels_are_the_bases(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert made.label_names == ["labels"]
    batch = next(iter(made.get_train_dataloader()))
    assert {"input_ids", "labels"} <= set(batch)
    assert "note" not in batch
    assert made.evaluate()["eval_loss"] > 0
    assert made.predict(rows(4)).metrics["test_loss"] > 0  # pyright: ignore[reportOptionalSubscript]


class PowerCut(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


def test_a_cut_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    trainer(tmp_path / "a").train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "b", PowerCut()).train()
    trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    one, other = (tensors(tmp_path / n / "checkpoint-4") for n in "ab")
    assert all(one[key].equal(other[key]) for key in one.keys() | other.keys())
    assert any("classifier" in key for key in one)
    assert not (tmp_path / "a" / "checkpoint-4" / "model.safetensors").exists()


def test_the_best_adapter_is_brought_back(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    made.train()
    made.save_model(str(tmp_path / "best"))
    best, kept = tensors(Path(made.state.best_model_checkpoint or "")), tensors(tmp_path / "best")
    assert all(best[key].equal(kept[key]) for key in best)


def test_what_is_pushed_is_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's stand-in notes what a folder holds as it is uploaded."""
    pushed: list[set[str]] = []

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            pushed.append({p.name for p in Path(folder_path).iterdir() if p.is_file()})
            return SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: None)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("transformers.trainer.is_peft_available", lambda: False)
    made = trainer(
        tmp_path, push_to_hub=True, hub_model_id="me/adapter", hub_strategy="all_checkpoints", hub_always_push=True
    )
    made.train()
    made.push_to_hub(blocking=True)
    assert pushed
    assert all({"adapter_config.json", "adapter_model.safetensors"} <= names for names in pushed)
    assert not any("model.safetensors" in names for names in pushed)
