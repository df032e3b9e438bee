# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a tiny model: what they write, resuming, early stopping, the same bytes twice, refusals."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from graftlet.errors import ConfigError, TrainingInterrupted
from graftlet.train.batches import Collator, Rows
from graftlet.train.callbacks import RichProgress, clock
from graftlet.train.recipe import check
from graftlet.train.run import Result, train
from graftlet.train.trainer import AdapterTrainer, training_arguments

from . import tiny

QUIET = Console(quiet=True)


def run(*places: Path, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any) -> Result:
    return train(check(tiny.recipe(*places, **changes)), callbacks, QUIET)


def weights(result: Result | Path) -> bytes:
    folder = result if isinstance(result, Path) else result.output
    return (folder / "adapter_model.safetensors").read_bytes()


class Crash(TrainerCallback):
    """A power cut after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def cut_and_resumed(
    go: Callable[..., Result], tmp_path: Path, step: int, every: dict[str, Any]
) -> tuple[Result, Result]:
    """A whole run, and one that was cut at a step and went on from the checkpoint before: the same bytes."""
    whole = go(training=every, output=str(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="power cut"):
        go(Crash(step), training=every)
    resumed = go(training=every, resume=True)
    assert resumed.summary["training"]["resumed_from"].endswith(f"checkpoint-{step - 1}")
    assert weights(resumed) == weights(whole)
    return whole, resumed


def test_a_run_writes_an_adapter_a_summary_and_a_report(base: Path, data: Path, tmp_path: Path) -> None:
    result = run(base, data, tmp_path / "out", evaluation={"verify": True})
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "report.html", "summary.json"} <= {
        p.name for p in result.output.iterdir()
    }
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary == result.summary
    before, after, loaded, merged = summary["measured"]
    assert after["validation_loss"] < before["validation_loss"]
    assert loaded == {**after, "stage": loaded["stage"], "same_answers": 6}
    assert merged["same_answers"] == 6
    assert merged["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-4)
    assert summary["adapter"]["trainable"] == sum(
        p.numel() for p in result.load(is_trainable=True).parameters() if p.requires_grad
    )
    assert summary["training"]["steps"] == 6
    assert len(summary["samples"]) == 2
    assert summary["data"]["test"] == {**summary["data"]["test"], "examples": 6, "groups": {"even": 3, "odd": 3}}


def test_the_report_loads_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(data, [{**r, "text": f"<script>{r['text']}"} for r in tiny.rows()])
    page = run(base, data, tmp_path / "out", title="A <b> & C").report.read_text()
    assert "<title>A &lt;b&gt; &amp; C</title>" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<link" not in page
    assert not re.search(r"url\(|@import|https?://", page.replace("Apache-2.0", ""))
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 8  # four charts, light and dark
    assert all(s.startswith("data:image/png;base64,iVBOR") for s in sources)
    assert "prefers-color-scheme: dark" in page


def test_the_same_seed_gives_the_same_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    first, second = (run(base, data, tmp_path / name) for name in "ab")
    assert weights(first) == weights(second)
    assert weights(run(base, data, tmp_path / "c", seed=1)) != weights(first)


@pytest.mark.parametrize("packing", [False, True])
def test_resuming_ends_where_the_whole_run_does(base: Path, data: Path, tmp_path: Path, packing: bool) -> None:
    every = {"save_every": 2, "packing": packing, "accumulation": 2, "max_steps": 7, "warmup": 0.3}
    every |= {"evaluate_every": 2, "epochs": 9}
    adapter = {"lora_dropout": 0.1}
    limit = {"max_length": 64}
    whole = run(base, data, tmp_path / "whole", training=every, adapter=adapter, data=limit)
    cut = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(base, data, cut, training=every, adapter=adapter, data=limit, callbacks=(Crash(5),))
    resumed = run(base, data, cut, training=every, adapter=adapter, data=limit, resume=True)
    assert resumed.summary["training"]["resumed_from"].endswith("checkpoint-4")
    assert weights(resumed) == weights(whole)
    assert resumed.summary["measured"] == whole.summary["measured"]


UNFINISHED = [
    {"method": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
    {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2},
    {"method": "adamss", "r": 8, "num_subspaces": 3, "use_asa": True, "asa_target_subspaces": 4, "mask_interval": 2}
    | {"init_warmup": 1, "final_warmup": 5},
]


@pytest.mark.parametrize("adapter", UNFINISHED, ids=lambda a: a["method"])
def test_resuming_where_training_needs_more_than_the_adapters_file(
    base: Path, data: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    every = {"save_every": 2, "max_steps": 8}
    whole = run(base, data, tmp_path / "whole", training=every, adapter=adapter, evaluation={"verify": True})
    _, after, *again = whole.summary["measured"]
    assert len(again) == (1 if adapter["method"] == "p_tuning" else 2)  # it has no merged form
    assert [m["validation_loss"] for m in again] == pytest.approx([after["validation_loss"]] * len(again), rel=1e-3)
    with pytest.raises(RuntimeError, match="power cut"):
        run(base, data, tmp_path / "cut", training=every, adapter=adapter, callbacks=(Crash(5),))
    resumed = run(base, data, tmp_path / "cut", training=every, adapter=adapter, resume=True)
    assert weights(resumed) == weights(whole)


def test_adalora_ends_with_its_budget(base: Path, data: Path, tmp_path: Path) -> None:
    result = run(base, data, tmp_path / "out", training={"max_steps": 8}, adapter=UNFINISHED[1])
    config = json.loads((result.output / "adapter_config.json").read_text())
    assert config["total_step"] == 8
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * len(config["rank_pattern"])
    with pytest.raises(ConfigError, match="adapter.tinit: .*total_step=3 leaves no step for cuts"):
        run(base, data, tmp_path / "b", training={"max_steps": 3}, adapter={**UNFINISHED[1], "tinit": 2})


def test_a_torn_checkpoint_is_passed_over(base: Path, data: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(base, data, cut, training={"save_every": 1}, callbacks=(Crash(3),))
    (cut / "checkpoints/checkpoint-2/trainer_state.json").unlink(missing_ok=True)
    (cut / "checkpoints/checkpoint-9").mkdir()
    resumed = run(base, data, cut, training={"save_every": 1}, resume=True)
    assert resumed.summary["training"]["steps"] == 6


def test_resuming_with_another_recipe_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    run(base, data, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another recipe: training.learning_rate was 0.01, is 0.1"):
        run(base, data, tmp_path / "out", training={"learning_rate": 0.1}, resume=True)


def test_early_stopping_keeps_the_best_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    table = {"evaluate_every": 1, "patience": 2, "max_steps": 40, "learning_rate": 0.3, "keep": 1}
    result = run(base, data, tmp_path / "out", training=table, evaluation={"verify": True})
    facts = result.summary["training"]
    assert facts["steps"] < 40
    losses = {h["step"]: h["eval_loss"] for h in result.summary["history"] if "eval_loss" in h}
    assert facts["best_step"] == min(losses, key=lambda s: losses[s])
    assert weights(result) == weights(result.output / f"checkpoints/checkpoint-{facts['best_step']}")
    assert result.summary["measured"][1]["validation_loss"] == pytest.approx(min(losses.values()))
    assert result.summary["measured"][2]["validation_loss"] == pytest.approx(min(losses.values()))


def test_accumulated_steps_are_those_of_the_large_batch(base: Path, data: Path, tmp_path: Path) -> None:
    large = run(base, data, tmp_path / "a", training={"batch_size": 8, "max_steps": 2})
    small = run(base, data, tmp_path / "b", training={"batch_size": 2, "accumulation": 4, "max_steps": 2})
    assert small.summary["measured"][1]["validation_loss"] == pytest.approx(
        large.summary["measured"][1]["validation_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"gradient_checkpointing": True}},
        {"training": {"mixed_precision": "bf16"}},
        {"model": {"dtype": "bfloat16"}},
        {"training": {"packing": True}, "data": {"max_length": 128}},
        {"training": {"arguments": {"lr_scheduler_type": "polynomial"}}},
        {"data": {"validation": 0, "test": 0}, "evaluation": {"metric": "none"}},
        {"evaluation": {"metric": "exact_match", "on": "validation"}},
        {
            "adapter": {"method": "ia3", "r": None, "target_modules": ["v_proj"], "feedforward_modules": []},
            "training": {"learning_rate": 0.5},
        },
    ],
    ids=str,
)
def test_options_train(base: Path, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = {
        k: v
        for k, v in {**tiny.recipe(base, data, data)["adapter"], **changes.get("adapter", {})}.items()
        if v is not None
    }
    tables = tiny.recipe(base, data, tmp_path / "out", **changes)
    tables["adapter"] = adapter
    result = train(check(tables), (), QUIET)
    losses = [h["loss"] for h in result.summary["history"] if "loss" in h]
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    plain = run(base, data, tmp_path / "a")
    saving = run(base, data, tmp_path / "b", training={"gradient_checkpointing": True})
    assert weights(plain) == weights(saving)


def test_ctrl_c_saves_and_says_how_to_go_on(base: Path, data: Path, tmp_path: Path) -> None:
    import signal

    class Press(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="stopped after step 3 of 6; go on with resume=true"):
        run(base, data, tmp_path / "out", callbacks=(Press(),))
    assert signal.getsignal(signal.SIGINT) is before
    assert run(base, data, tmp_path / "out", resume=True).summary["training"]["steps"] == 6


def test_grouping_by_length_leaves_little_to_fill(base: Path, data: Path, tmp_path: Path) -> None:
    filling = {}
    for grouped in (False, True):
        table = {"group_by_length": grouped, "max_steps": 1}
        recipe = check(tiny.recipe(base, data, tmp_path / str(grouped), training=table))
        args = training_arguments(recipe, torch.device("cpu"), 1)
        lengths = torch.randint(2, 60, (64,), generator=torch.Generator().manual_seed(0)).tolist()
        rows = Rows([{"input_ids": [1] * n, "labels": [1] * n} for n in lengths])
        trainer = AdapterTrainer(tiny.model(), args, Collator(0), rows)
        masks = [b["attention_mask"] for b in trainer.get_train_dataloader()]
        filling[grouped] = sum(int((m == 0).sum()) for m in masks)
    assert filling[True] < filling[False] / 2


def test_outputs_are_not_overwritten_by_accident(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = weights(run(base, data, out))
    with pytest.raises(ConfigError, match="exists and is not empty. Set overwrite=true"):
        run(base, data, out)
    (out / "checkpoints/checkpoint-1").mkdir(parents=True)
    assert weights(run(base, data, out, overwrite=True)) == first
    assert not (out / "checkpoints/checkpoint-1").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(ConfigError, match="holds no training run"):
        run(base, data, other, overwrite=True)
    assert (other / "cat.jpg").exists()
    with pytest.raises(ConfigError, match="is a file"):
        run(base, data, data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"max_length": 3}}, "every training example is longer"),
        ({"data": {"validation": 0}, "training": {"patience": 1, "evaluate_every": 1}}, "set data.validation"),
        ({"data": {"test": 0}}, "needs held-out examples; set data.test"),
        ({"model": {"device": "gpu"}}, "model.device = 'gpu' is no device"),
        ({"model": {"source": "/no/such/model"}}, "/no/such/model"),
        ({"evaluation": {"choices": ["odd", "eve"]}}, "the held-out answers also have even"),
        ({"evaluation": {"choices": ["odd", "even", "evil"]}}, "begin with the same token"),
        ({"training": {"arguments": {"max_stps": 1}}}, "no such field, did you mean 'max_steps'"),
        ({"adapter": {"target_modules": ["no_such"]}}, "no_such"),
    ],
    ids=str,
)
def test_refusals(base: Path, data: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        run(base, data, tmp_path / "out", **changes)
    assert said in str(caught.value)


def test_the_progress_display_works_with_any_trainer(tmp_path: Path) -> None:
    rows = Rows([{"input_ids": [1, 2, 3, i], "labels": [1, 2, 3, i]} for i in range(8)])
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, logging_steps=2, disable_tqdm=True,
        report_to="none", use_cpu=True, save_strategy="no", include_num_input_tokens_seen="all",
    )  # fmt: skip
    told = {}
    for terminal in (False, True):
        console = Console(record=True, force_terminal=terminal, width=120, file=io.StringIO())
        trainer = Trainer(tiny.model(), args, Collator(0), rows, callbacks=[RichProgress(console)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        told[terminal] = console.export_text()
    for step, line in zip((2, 4), told[False].splitlines(), strict=True):
        assert re.match(rf"step +{step}/4  loss 5\.\d+  [\d,]+ tokens/s  \d\.\d+ GiB  0:0\d left$", line)
    assert re.search(r"training .* 4/4 loss 5\.\d+ +[\d,]+ tokens/s", told[True])


def test_clock() -> None:
    assert [clock(x) for x in (0, 59.6, 3600, 7322)] == ["0:00", "1:00", "1:00:00", "2:02:02"]


def test_free_cores_are_used() -> None:
    from graftlet.train.base import set_threads

    before = torch.get_num_threads()
    try:
        assert set_threads(1) == 1 == torch.get_num_threads()
        assert set_threads("auto") >= 1
    finally:
        torch.set_num_threads(before)
