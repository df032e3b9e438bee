# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with an adapter's checkpoints, and its arguments as a recipe has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from ..errors import ConfigError, nearest
from ..pair import WEIGHTS
from ..requirements import Requirement
from .checkpoints import AdapterCheckpoints
from .optimisers import NAMES, by_name
from .recipe import Recipe

CHECKPOINTS = "checkpoints"
LOGS = "logs"


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """A Trainer whose checkpoints hold the adapter alone, and which restores it from them exactly.

    make_optimizer: of the model; the arguments' own optimiser unless given.
    """

    def __init__(self, *args: Any, make_optimizer: Callable[[Any], Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_optimizer = make_optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None and self.make_optimizer is not None:
            self.optimizer = self.make_optimizer(self.accelerator.unwrap_model(self.model))
        return super().create_optimizer(*args, **kwargs)


class RowTrainer(AdapterTrainer):
    """A Trainer whose loss is a mean over rows, not over tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # else a batch's loss would be divided by a number of tokens


def training_arguments(
    recipe: Recipe, device: torch.device, steps: int, kind: Any = TrainingArguments
) -> TrainingArguments:
    """The Trainer's arguments for a run of `steps` steps; `ConfigError` for an unknown one in `training.arguments`."""
    table = recipe.training
    known = {f.name for f in dataclasses.fields(kind)}
    for name in table.arguments:
        if name not in known:
            place = recipe.place("training", "arguments", name)
            raise ConfigError(
                f"{place}: transformers' TrainingArguments has no such field{nearest(name, known) or '.'}"
            )
    saving = table.save_every or table.evaluate_every
    values: dict[str, Any] = {
        "output_dir": str(Path(recipe.output, CHECKPOINTS)),
        "num_train_epochs": table.epochs,
        "max_steps": table.max_steps or -1,
        "per_device_train_batch_size": table.batch_size,
        "per_device_eval_batch_size": recipe.evaluation.batch_size,
        "gradient_accumulation_steps": table.accumulation,
        "learning_rate": table.learning_rate,
        "lr_scheduler_type": table.schedule,
        "warmup_steps": round(table.warmup * steps),
        "weight_decay": table.weight_decay,
        "max_grad_norm": table.max_grad_norm,
        "optim": _optim(recipe),
        "bf16": table.mixed_precision == "bf16",
        "fp16": table.mixed_precision == "fp16",
        **_checkpointing(table.gradient_checkpointing, known),
        **_grouping(table.group_by_length, known),
        "logging_steps": table.log_every,
        **_every("eval", table.evaluate_every),
        **_every("save", saving),
        "save_total_limit": table.keep,
        "load_best_model_at_end": table.patience is not None,
        "metric_for_best_model": "eval_loss" if table.patience is not None else None,
        "seed": recipe.seed,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "report_to": [name for name in table.report_to if name != "tensorboard"] or "none",
        "run_name": recipe.title or Path(recipe.output).name,
    }
    args = kind(**{**values, **table.arguments})
    args._n_gpu = min(args.n_gpu, 1)  # several devices are accelerate's business, one process each
    return args


TRACKERS = {
    "tensorboard": Requirement("training.report_to = 'tensorboard'", "tensorboard", ">=2.10"),
    "trackio": Requirement("training.report_to = 'trackio'", "trackio", ">=0.5"),
    "wandb": Requirement("training.report_to = 'wandb'", "wandb", ">=0.16"),
}


def check_trackers(recipe: Recipe) -> None:
    """Raise `DependencyError` where what a recipe reports to is not installed."""
    for name in recipe.training.report_to:
        TRACKERS[name].check()


def trackers(recipe: Recipe) -> list[TrainerCallback]:
    """What has to be told where to write: of itself, TensorBoard's callback begins in the working directory."""
    if "tensorboard" not in recipe.training.report_to:
        return []
    from transformers.integrations.integration_utils import TensorBoardCallback

    made: Any = TensorBoardCallback()
    made.logging_dir = made.logging_dir or str(Path(recipe.output, LOGS))
    return [made]


def optimizer_maker(recipe: Recipe) -> Callable[[Any], Optimizer] | None:
    """What makes the recipe's optimiser, where it is one of ours."""
    table = recipe.training
    if table.optimizer not in NAMES:
        return None
    rest = table.learning_rate, table.weight_decay, table.optimizer_options
    return lambda model: by_name(table.optimizer, model, *rest)


def _optim(recipe: Recipe) -> str:
    """transformers' name for the recipe's optimiser; its default where the optimiser is one of ours."""
    name, known = recipe.training.optimizer, [o.value for o in OptimizerNames]
    if name in NAMES:
        return OptimizerNames.ADAMW_TORCH.value
    place = recipe.place("training", "optimizer")
    if name not in known:
        raise ConfigError(f"{place} = {name!r}: there is no such optimiser{nearest(name, [*known, *NAMES]) or '.'}")
    if recipe.training.optimizer_options:
        raise ConfigError(
            f"{recipe.place('training', 'optimizer_options')}: these are for {', '.join(NAMES)}; options of {name!r} go "
            "into training.arguments.optim_args."
        )
    return name


def _checkpointing(on: bool, known: set[str]) -> dict[str, Any]:
    if not on:
        return {}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    # the reentrant kind loses the gradient where a block's input needs none, as under an adapter
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _grouping(on: bool, known: set[str]) -> dict[str, Any]:
    if not on:
        return {}
    return {"group_by_length": True} if "group_by_length" in known else {"train_sampling_strategy": "group_by_length"}


def _every(kind: str, every: int | str | None) -> dict[str, Any]:
    if isinstance(every, int):
        return {f"{kind}_strategy": "steps", f"{kind}_steps": every}
    return {f"{kind}_strategy": "epoch" if every else "no"}


def last_checkpoint(output: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; one cut short while it was written is passed over."""
    folders = [p for p in Path(output, CHECKPOINTS).glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()]
    whole = [p for p in folders if (p / "trainer_state.json").is_file() and (p / WEIGHTS).is_file()]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
