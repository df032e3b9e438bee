# SPDX-License-Identifier: Apache-2.0
"""Callbacks for a recipe's Trainer, or for your own: `Trainer(..., callbacks=[RichProgress()])` with `disable_tqdm`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.parts import root_of
from ..model.peft_model import PeftModel
from .several import any_of

TOLD_EVERY = 10.0
"""Seconds between plain lines that say how far a start from data is."""


def memory_used(device: torch.device | None = None) -> int:
    """Bytes: the most that a CUDA device has held, else what this process holds in main memory; 0 where unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss


def clock(seconds: float) -> str:
    """`1:23` or `1:02:03`."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class RichProgress(TrainerCallback):
    """Loss, tokens a second, memory and time left: a live line on a terminal, a plain line a log entry elsewhere.

    Tokens are counted where `TrainingArguments.include_num_input_tokens_seen` is set.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live: Live | None = None
        self._active = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun, self._first = time.perf_counter(), state.global_step
        self._tokens = state.num_input_tokens_seen
        self._loss = float("nan")
        self._active = True
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(), console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, words="")
        if self.console.is_terminal and state.is_world_process_zero:
            self._live = Live(self._bar, console=self.console, refresh_per_second=4)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step, words=self._describe(args, state))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not self._active:
            return
        if "loss" in logs:
            self._loss = float(logs["loss"])
            if self._live is None:
                self.console.print(f"step {state.global_step:>4}/{state.max_steps}  {self._describe(args, state)}")
        elif "eval_loss" in logs:
            self.console.print(
                f"step {state.global_step:>4}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live display off the terminal; also needed after an error in training."""
        self._active = False
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _describe(self, args: TrainingArguments, state: TrainerState) -> str:
        spent = time.perf_counter() - self._begun
        done = max(state.global_step - self._first, 1)
        left = spent / done * (state.max_steps - state.global_step)
        tokens = state.num_input_tokens_seen - self._tokens
        parts = [f"loss {self._loss:.4f}"] if self._loss == self._loss else []
        parts += [f"{tokens / spent:,.0f} tokens/s"] if tokens else []
        parts += [f"{memory_used(args.device) / 2**30:.2f} GiB", f"{clock(left)} left"]
        return "  ".join(parts)


@contextmanager
def measuring(console: Console, name: str) -> Iterator[Callable[[int, int, int], None]]:
    """How far a start from data is, by layers: a live line on a terminal, a plain line now and then elsewhere."""
    begun = told = time.perf_counter()
    done = total = calls = 0
    bar = Progress(
        TextColumn(f"start {name}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    task = bar.add_task("", words="")

    def show(*facts: int) -> None:
        nonlocal told, done, total, calls
        done, total, calls = facts
        bar.update(task, completed=done, total=total, words=f"layers, {calls} batches")
        if not console.is_terminal and time.perf_counter() - told > TOLD_EVERY:
            told = time.perf_counter()
            console.print(f"start {name}: {done} of {total} layers, {calls} batches")

    with bar:
        yield show
    spent = clock(time.perf_counter() - begun)
    console.print(f"start {name}: {done} of {total} layers measured in {calls} batches, {spent}")


class Allocation(TrainerCallback):
    """Lets methods that shrink an adapter as it learns (AdaLoRA's ranks, AdaMSS's subspaces) do so after each step."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # what it trains may be a part of the model
        adapted = next((m for m in root_of(model).modules() if isinstance(m, PeftModel)), None)
        if adapted is not None and adapted.tuner is not None:
            adapted.tuner.update_and_allocate(state.global_step)


class StopOnSignal(TrainerCallback):
    """On the first Ctrl-C finish the step, save a checkpoint and stop; a second one interrupts at once.

    `stopped` says whether that happened here, `everywhere` whether it did in any of several processes, which stop together.
    """

    def __init__(self) -> None:
        self.stopped = self.everywhere = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            self._before = signal.signal(signal.SIGINT, self._stop)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.everywhere = any_of(self.stopped)
        if self.everywhere:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
