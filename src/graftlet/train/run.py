# SPDX-License-Identifier: Apache-2.0
"""The whole of a training run: prepare, measure, train, save, measure again, verify, report."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed

from .. import __version__
from ..errors import ConfigError, MergeError, TrainingInterrupted
from ..files import write_atomically
from ..model.auto import AutoPeftModel
from ..model.peft_model import PeftModel
from ..pair import WEIGHTS
from ..weights.whole import is_writer
from .anatomy import read_anatomy
from .base import load_tokenizer, pick_device, set_threads
from .batches import check_isolation
from .callbacks import Allocation, RichProgress, StopOnSignal, clock
from .prepare import REPORT, SUMMARY, Prepared, adapter_config, claim_output, prepare_data, tell_steps
from .recipe import Recipe
from .report import write_report
from .score import Score, named, shown
from .several import join, on_first, voice
from .sources import model_folder
from .starts import Batches, adapted, initial_of
from .task import Measure
from .tasks import task_of
from .trainer import check_trackers, optimizer_maker, trackers, training_arguments

SHOWN = ("name", "rank", "norm", "effective_rank")
"""What the summary says of each layer that is a low-rank change."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, which is the adapter's, and what `summary.json` says."""

    output: Path
    summary: dict[str, Any]

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.output / REPORT

    def load(self, **kwargs: Any) -> PeftModel:
        """The base with the trained adapter."""
        return AutoPeftModel.from_pretrained(str(self.output), **self.summary["head"], **kwargs)


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = (), console: Console | None = None) -> Result:
    """Carry out a recipe, on one process or, under `torchrun` or `accelerate launch`, on several that share the data.

    Args:
        recipe: from `load_recipe`, or made in Python.
        callbacks: further callbacks for the Trainer.
        console: where progress goes; `Console(quiet=True)` for nowhere.

    Returns:
        The folder and the summary. The folder holds the adapter and its tokenizer, `report.html`, `summary.json`,
        `recipe.json` and the checkpoints.

    Raises:
        ConfigError: a wrong recipe or wrong data; nothing was trained.
        DependencyError: a source needs a package that is missing.
        TrainingInterrupted: stopped by Ctrl-C; `resume = true` goes on.
    """
    processes = join(pick_device(recipe.model.device))
    return _Run(recipe, voice(console), processes).carry_out(callbacks)


@dataclass
class _Run:
    recipe: Recipe
    console: Console
    processes: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    def carry_out(self, callbacks: Sequence[TrainerCallback]) -> Result:
        begun = time.perf_counter()
        check_trackers(self.recipe)
        self.task = task_of(self.recipe)
        self.task.check()
        config = adapter_config(self.recipe)
        if self.recipe.training.packing and config.is_prompt_learning:
            place = self.recipe.place("training", "packing")
            raise ConfigError(f"{place}: a prompt method puts its tokens before a row, not before each example in it.")
        checkpoint = on_first(lambda: claim_output(self.recipe))
        with self.stage("prepare"):
            device, threads = pick_device(self.recipe.model.device), set_threads(self.recipe.model.threads)
            folder = model_folder(self.recipe.model.source, self.say)
        with self.stage("data"):
            data = prepare_data(self.recipe, load_tokenizer(folder, self.recipe.model), self.task)
            self.scorer = self._scorer(data)
        self._tell_data(data)
        tell_steps(self.recipe, config, self._steps(data))
        with self.stage("model"):
            args = training_arguments(
                self.recipe, device, self._steps(data), self.task.arguments
            )  # first: an engine loads a base its own way
            set_seed(self.recipe.seed)  # a new head is made of it
            base = self.task.base(folder)
            set_seed(self.recipe.seed)
            pad, output = data.encoder.tokenizer.pad_token_id, Path(self.recipe.output)
            self.collate = self.task.collator(pad, base, config)
            batches = Batches(data.train, self.task.opening(pad), self.recipe.training.batch_size, base.device)
            model: Any = adapted(base, config, batches, output, self.console)
            self.initial = initial_of(config, output)
        trainer = self._trainer(model, data, args, callbacks)
        facts = self._model_facts(model, folder, threads)
        self._tell_model(facts)
        before = self._before(model, trainer)
        self._train(trainer, checkpoint)
        after = self._after(model, trainer, data)
        history, training = trainer.state.log_history, self._training_facts(trainer, checkpoint, data)
        if self.recipe.evaluation.verify and not self.sharded:
            del model, base, trainer  # room for a fresh one
            gc.collect()
            self._verify(folder, args, data)
        self.seconds["total"] = time.perf_counter() - begun
        samples = [
            {"prompt": e.messages[-2]["content"], "expected": e.answer, "before": b, "after": a}
            for e, b, a in zip(self.scorer.examples, before, after, strict=False)
        ]
        return self._finish({**facts, "data": data.facts, "training": training}, samples, history)

    # --- stages -------------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[name]`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def _scorer(self, data: Prepared) -> Measure:
        table = self.recipe.evaluation
        examples = data.held_out[table.on] or data.splits.test or data.splits.validation
        self.metric = self.task.metric if examples else table.metric
        if table.metric != "none" and not data.held_out[table.on]:
            place = self.recipe.place("evaluation", "metric")
            raise ConfigError(f"{place} = {table.metric!r} needs held-out examples; set data.{table.on}.")
        return self.task.measure(data.encoder, examples or data.splits.train[: table.samples])

    def _steps(self, data: Prepared) -> int:
        table = self.recipe.training
        batches = math.ceil(len(data.train) / (table.batch_size * self.processes))
        a_pass = math.ceil(batches / table.accumulation)
        return table.max_steps or math.ceil(a_pass * table.epochs)

    def _trainer(self, model: Any, data: Prepared, args: Any, callbacks: Sequence[TrainerCallback]) -> Any:
        table = self.recipe.training
        self.progress, self.stop = RichProgress(self.console), StopOnSignal()
        own: list[TrainerCallback] = [self.progress, self.stop, Allocation(), *trackers(self.recipe)]
        if table.patience:
            own.append(EarlyStoppingCallback(early_stopping_patience=table.patience))
        trainer = self.task.trainer(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=data.train,
            eval_dataset=data.validation,
            callbacks=[*own, *callbacks],
            make_optimizer=optimizer_maker(self.recipe),
        )
        trainer.remove_callback(PrinterCallback)
        self.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if table.packing:
            batch = self.collate([data.train[i] for i in range(min(2, len(data.train)))])
            check_isolation(model, {k: batch[k].to(model.device) for k in ("input_ids", "position_ids")})
        return trainer

    def _before(self, model: Any, trainer: Any) -> list[str]:
        with self.stage("measure before"), model.disable_adapter():
            self.measure("before", model, None if self.sharded else self._loss(trainer))
            return self._samples(model)

    def _samples(self, model: Any) -> list[str]:
        """Answers of a model; of one that is in parts, none."""
        return [] if self.sharded else self.scorer.samples(model, self.recipe.evaluation.samples)

    def _train(self, trainer: Any, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self.say(f"resuming from {checkpoint}")
        with self.stage("train"):
            _forget_peak(trainer.args.device)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                self.progress.close()
                self.stop.close()
                self.peak = _peak_memory(trainer.args.device)
        if self.stop.everywhere and trainer.state.global_step < trainer.state.max_steps:
            raise TrainingInterrupted(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                f"go on with resume=true output={self.recipe.output}."
            )

    def _after(self, model: Any, trainer: Any, data: Prepared) -> list[str]:
        with self.stage("save"):
            to, initial = self.recipe.output, self.initial
            model.save_pretrained(to, is_main_process=is_writer(), path_initial_model_for_weight_conversion=initial)
            on_first(lambda: data.encoder.tokenizer.save_pretrained(to) and None)
        with self.stage("measure after"):
            self.measure("after training", model, self._loss(trainer))
            return self._samples(model)

    def _verify(self, folder: str, args: Any, data: Prepared) -> None:
        with self.stage("verify"):
            base = self.task.base(folder)
            model: Any = PeftModel.from_pretrained(base, self.recipe.output)
            self.measure("saved and loaded into a fresh base", model, self._fresh_loss(model, args, data))
            try:
                merged: Any = model.merge_and_unload(safe_merge=True, dequantize=True)
            except (ConfigError, MergeError) as why:  # not every method has a merged form
                self.say(f"not merged: {why}")
                return
            if not self.task.merges:
                return
            self.measure("merged into the base", merged, self._fresh_loss(merged, args, data))

    def _fresh_loss(self, model: Any, args: Any, data: Prepared) -> float | None:
        trainer = self.task.trainer(model=model, args=args, data_collator=self.collate, eval_dataset=data.validation)
        trainer.remove_callback(PrinterCallback)
        return self._loss(trainer)

    @staticmethod
    def _loss(trainer: Any) -> float | None:
        return trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else None

    def measure(self, stage: str, model: Any, loss: float | None) -> None:
        """Record, and tell, how a model does on what was held out."""
        entry: dict[str, Any] = {"stage": stage, "validation_loss": loss}
        if self.metric != "none" and not self.sharded:
            score = self.scorer(model)
            entry |= {"metric": score.value, "of": len(score.answers)}
            entry |= {"right": sum(score.right)} if score.right else {}
            if len(self.scores) > 1:
                entry["same_answers"] = score.same_as(self.scores[1])  # as right after training
            self.scores.append(score)
        self.measured.append(entry)
        told = describe(entry, self.metric)
        self.say(
            f"{stage}: {told or ('not measured: the model is in parts' if self.sharded else 'nothing is held out')}"
        )

    # --- what is told -------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """One line on the console."""
        self.console.print(text, soft_wrap=True, markup=False)

    def _tell_data(self, data: Prepared) -> None:
        facts = data.facts
        self.say(f"data: {facts['rows']} rows, {facts['filtered']} filtered out, {facts['doubles']} doubles left out")
        for name, use in (("train", "trained on"), ("validation", "held out"), ("test", "held out")):
            part = facts[name]
            if part["examples"]:
                groups = ", ".join(f"{n} {g}" for g, n in part["groups"].items())
                long = f", {part['too_long']} too long" if part["too_long"] else ""
                self.say(f"  {name}: {part['examples']} examples {use}{f' ({groups})' if groups else ''}{long}")

    def _model_facts(self, model: Any, folder: str, threads: int) -> dict[str, Any]:
        trainable, total = model.get_nb_trainable_parameters()
        table = self.recipe.model
        return {
            "model": {
                "source": table.source,
                "folder": folder,
                "parameters": total - trainable,
                "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
                "device": str(model.device),
                "threads": threads,
            },
            "adapter": {
                "method": self.recipe.adapter.method.upper(),
                "trainable": trainable,
                "share": trainable / total,
            },
        }

    def _tell_model(self, facts: dict[str, Any]) -> None:
        model, adapter = facts["model"], facts["adapter"]
        self.say(f"base: {model['source']}, {model['parameters']:,} parameters, {model['dtype']} on {model['device']}")
        self.say(f"adapter: {adapter['method']}, {adapter['trainable']:,} trainable ({adapter['share']:.2%})")

    def _training_facts(self, trainer: Any, checkpoint: Path | None, data: Prepared) -> dict[str, Any]:
        state = trainer.state
        tokens = data.facts["train"]["tokens"]
        best = state.best_model_checkpoint if self.recipe.training.patience else None
        return {
            "processes": self.processes,
            "steps": state.global_step,
            "planned_steps": state.max_steps,
            "epochs": state.epoch,
            "tokens_an_epoch": tokens,
            "tokens_a_second": state.num_input_tokens_seen / self.seconds["train"] if not checkpoint else None,
            "peak_memory": self.peak,
            "resumed_from": str(checkpoint) if checkpoint else None,
            "best_step": int(best.rsplit("-", 1)[1]) if best else None,
        }

    def _finish(self, facts: dict[str, Any], samples: list[dict[str, Any]], history: list[dict[str, Any]]) -> Result:
        output = Path(self.recipe.output)
        facts["adapter"]["bytes"] = (output / WEIGHTS).stat().st_size
        summary = {
            "graftlet": __version__,
            "title": self.recipe.title or output.name,
            **facts,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "metric": "none" if self.sharded else self.metric,
            "unit": self.task.unit,
            "head": self.task.head,
            "measured": self.measured,
            "samples": samples,
            "layers": [{k: v for k, v in x.items() if k in SHOWN} for x in read_anatomy(output)["layers"]],
            "history": history,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        on_first(lambda: self._write(summary, output))
        spent = {k: v for k, v in self.seconds.items() if k != "total"}
        self.say(
            "time: "
            + ", ".join(f"{k} {clock(v)}" for k, v in spent.items())
            + f"; {clock(self.seconds['total'])} in all"
        )
        self.say(f"adapter: {output}/  ({facts['adapter']['bytes'] / 2**20:.1f} MiB)")
        self.say(f"report: {output / REPORT}")
        return Result(output, summary)

    @staticmethod
    def _write(summary: dict[str, Any], output: Path) -> None:
        write_atomically(output / SUMMARY, json.dumps(summary, indent=2).encode())
        write_report(summary, output / REPORT)


def describe(entry: dict[str, Any], metric: str) -> str:
    """A measurement in words: `accuracy 95.5 % (191 of 200), validation loss 0.1234`."""
    parts = []
    if "metric" in entry:
        of = (
            f"{entry['right']} of {entry['of']} held-out examples right"
            if "right" in entry
            else f"{entry['of']} held out"
        )
        parts.append(f"{named(metric)} {shown(metric, entry['metric'])} ({of})")
    if entry["validation_loss"] is not None:
        parts.append(f"validation loss {entry['validation_loss']:.4f}")
    if "same_answers" in entry:
        parts.append(f"{entry['same_answers']} of {entry['of']} answers as after training")
    return ", ".join(parts)


def _forget_peak(device: torch.device) -> None:
    """Let the peak be training's own, where the device can count anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that the device, or without one this process, has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
