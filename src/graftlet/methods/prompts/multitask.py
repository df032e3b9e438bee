# SPDX-License-Identifier: Apache-2.0
"""Multitask prompt tuning: one prompt for all tasks times a low-rank factor a task (arXiv 2303.02861).   P_t = P * (C_t R_t)

P `[tokens * submodules, dim]`, C `[tasks, tokens * submodules, ranks]`, R `[tasks, ranks, dim]`. Each row of a batch has a
task.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.prompt import ROWS
from ...errors import CallError, ConfigError
from ...files import read_tensors
from ...registry import method
from .prompt_tuning import PromptEmbedding, PromptTuningConfig, count


class MultitaskPromptTuningInit(str, enum.Enum):
    """How the prompt and the tasks' factors start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"

    __str__ = str.__str__


SOURCED = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning.

    Args:
        prompt_tuning_init: RANDOM and TEXT as in prompt tuning. From an adapter trained on source tasks:
            AVERAGE_SOURCE_TASKS, its prompt and the mean of its tasks' factors; EXACT_SOURCE_TASK, its prompt and the
            factors of one task; ONLY_SOURCE_SHARED, its prompt alone.
        prompt_tuning_init_state_dict_path: that adapter's tensors, a safetensors file or a pickle of tensors alone.
        prompt_tuning_init_task: the task for EXACT_SOURCE_TASK.
        num_ranks, num_tasks: the factors' rank and number.
    """

    inits: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def check(self) -> None:
        super().check()
        path, kind = self.prompt_tuning_init_state_dict_path, str(self.prompt_tuning_init)
        needed = f"prompt_tuning_init={kind!r} needs prompt_tuning_init_state_dict_path."
        self.require(kind not in SOURCED or bool(path), needed)
        for name in ("num_ranks", "num_tasks"):
            given = getattr(self, name)
            self.require(given > 0, f"{name}={given}; a positive number is needed.")


@method("multitask_prompt_tuning", MultitaskPromptTuningConfig)
class MultitaskPromptEmbedding(PromptEmbedding):
    """The shared prompt, and the tasks' factors."""

    takes: ClassVar[tuple[str, ...]] = ("task_ids",)

    def __init__(self, config: MultitaskPromptTuningConfig, words: nn.Module, loading: bool = False) -> None:
        super().__init__(config, words, loading)
        tasks, ranks, dim = config.num_tasks, config.num_ranks, config.token_dim
        assert dim is not None
        self.prefix_task_cols = nn.Parameter(torch.normal(0.0, 0.02, (tasks, count(config), ranks)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0.0, 0.02, (tasks, ranks, dim)))
        if not loading and config.prompt_tuning_init in SOURCED:
            self.assign(source(config, self.saved()))

    def prompt(self, batch: int, given: Mapping[str, Any]) -> Tensor:
        tasks = self.tasks(given.get("task_ids"), batch)
        return self.rows() * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])

    def tasks(self, given: Any, batch: int) -> Tensor:
        """The task of each row. Raises `CallError` where they are missing, too many or unknown."""
        known = len(self.prefix_task_cols)
        ids = None if given is None else torch.as_tensor(given, device=self.prefix_task_cols.device)
        if ids is None or ids.shape != (batch,) or ids.is_floating_point() or not ((ids >= 0) & (ids < known)).all():
            shown = "nothing" if ids is None else ids.tolist()
            raise CallError(f"task_ids says each row's task: {batch} numbers from 0 to {known - 1}; given: {shown}.")
        return ids

    def saved(self) -> dict[str, Tensor]:
        factors = {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        return {**super().saved(), **factors}

    @torch.no_grad()
    def assign(self, given: Mapping[str, Tensor]) -> None:
        super().assign(given)
        for name in ("prefix_task_cols", "prefix_task_rows"):
            if name in given:
                getattr(self, name).copy_(given[name])


def source(config: MultitaskPromptTuningConfig, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a prompt starts from: of an adapter trained on source tasks, the prompt, and maybe one task's factors.

    They start every task of the new one. Raises `ConfigError` where a tensor is missing or has another shape than `own`.
    """
    path, kind = config.prompt_tuning_init_state_dict_path or "", config.prompt_tuning_init
    held, found = read_tensors(Path(path)), dict[str, Tensor]()
    for name in [ROWS] if kind == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED else own:
        tensor = held.get(name)
        if tensor is None:
            raise ConfigError(f"{path} has no {name}; it holds {', '.join(sorted(held)) or 'nothing'}.")
        if name != ROWS:
            tensor = of_task(tensor, config)
        if tensor.shape[-2:] != own[name].shape[-2:]:
            raise ConfigError(f"{name} of {path} is {list(tensor.shape)}; this prompt needs {list(own[name].shape)}.")
        found[name] = tensor
    return found


def of_task(factors: Tensor, config: MultitaskPromptTuningConfig) -> Tensor:
    """The factors of the source task that is asked for, or the mean of all, `[1, ...]`."""
    if config.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
        return factors.mean(0, keepdim=True)
    task, tasks = config.prompt_tuning_init_task, len(factors)
    if not 0 <= task < tasks:
        raise ConfigError(f"prompt_tuning_init_task={task}, but the source has {tasks} tasks: 0 to {tasks - 1}.")
    return factors[task : task + 1]
