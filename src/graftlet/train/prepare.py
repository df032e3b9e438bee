# SPDX-License-Identifier: Apache-2.0
"""What a run needs before it begins: its folder, the adapter's config, and the data as rows of tokens."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..errors import ConfigError, listing, nearest
from ..files import write_atomically
from ..registry import lookup
from .batches import Feature, Rows
from .data import Example, Splits, load_splits
from .recipe import Recipe
from .rules import RULES
from .task import Task
from .tasks import task_of
from .tokens import Encoder
from .trainer import CHECKPOINTS, LOGS, last_checkpoint

RECIPE = "recipe.json"
SUMMARY = "summary.json"
REPORT = "report.html"
_MARKS = (RECIPE, SUMMARY, "adapter_config.json")
_FREE = {"output", "overwrite", "resume", "title", "evaluation"}
"""Keys that may change between the beginning of a run and its resumption."""


UNTOLD = 10**9
"""Steps, as long as nobody knows how many there are."""


def adapter_config(recipe: Recipe) -> PeftConfig:
    """The config of the recipe's adapter, made and thereby checked; errors name the recipe's line.

    Raises:
        UnknownMethodError: no such method.
        ConfigError: the method has no such field, or does not take the value.
    """
    kind = lookup(recipe.adapter.method).config
    names = {f.name for f in dataclasses.fields(kind)}
    values = recipe.adapter.fields
    for name in values:
        if name not in names:
            hint = nearest(name, names) or "."
            raise ConfigError(f"{recipe.place('adapter', name)}: {kind.__name__} has no such field{hint}")
    if recipe.adapter.init is not None:
        values[_init_field(recipe, kind.__name__, names)] = recipe.adapter.init
    if kind.needs_steps is not None:
        values.setdefault(kind.needs_steps, recipe.training.max_steps or UNTOLD)
    try:
        return kind(**{"task_type": RULES[recipe.task].type, **values})
    except ConfigError as error:
        said = str(error.args[0])
        culprit = next((n for n in values if re.search(rf"\b{re.escape(n)}[= ]", said)), None)
        place = recipe.place("adapter", *([culprit] if culprit else []))
        raise ConfigError(f"{place}: {said}") from error


def tell_steps(recipe: Recipe, config: PeftConfig, steps: int) -> None:
    """Tell a method that plans by it how many steps training takes, unless the recipe does.

    Raises `ConfigError` where its plan does not fit into them.
    """
    name = config.needs_steps
    if name is None or name in recipe.adapter.fields:
        return
    setattr(config, name, steps)
    try:
        config.check()
    except ConfigError as error:
        raise ConfigError(f"{recipe.place('adapter')}: {error.args[0]}") from error


def _init_field(recipe: Recipe, kind: str, names: set[str]) -> str:
    found = sorted(n for n in names if n.startswith("init_") and "weights" in n)
    if len(found) != 1:
        raise ConfigError(
            f"{recipe.place('adapter', 'init')}: {kind} has {listing(found) or 'no such field'}; name it in full."
        )
    return found[0]


def claim_output(recipe: Recipe) -> Path | None:
    """Make the output folder ready, and return the checkpoint to resume from.

    Raises `ConfigError` where the folder has something in it and neither `overwrite` nor `resume` is set, where
    `overwrite` would delete what no run has written, or where `resume` meets another recipe's run.
    """
    folder = Path(recipe.output)
    if folder.is_file():
        raise ConfigError(f"{recipe.place('output')} = {recipe.output!r} is a file; a folder is needed.")
    filled = folder.is_dir() and any(folder.iterdir())
    checkpoint = None
    if filled and recipe.resume:
        _same_recipe(recipe, folder / RECIPE)
        checkpoint = last_checkpoint(folder)
    elif filled and not recipe.overwrite:
        raise ConfigError(
            f"{recipe.place('output')}: {recipe.output!r} exists and is not empty. "
            "Set overwrite=true to replace it, resume=true to go on with it, or another output."
        )
    elif filled:
        _clear(folder, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECIPE, recipe.model_dump_json(indent=2).encode())
    return checkpoint


def _clear(folder: Path, recipe: Recipe) -> None:
    if not any((folder / name).is_file() for name in _MARKS):
        raise ConfigError(
            f"{recipe.place('output')}: {recipe.output!r} holds no training run or adapter; "
            "overwrite=true deletes only such a folder. Choose another output."
        )
    for name in (CHECKPOINTS, LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def _same_recipe(recipe: Recipe, file: Path) -> None:
    if not file.is_file():
        raise ConfigError(
            f"{recipe.place('resume')}: {recipe.output!r} holds no {RECIPE}; no run of a recipe began there."
        )
    before, now = json.loads(file.read_text()), json.loads(recipe.model_dump_json())
    changed = [k for k in _leaves(now) | _leaves(before) if k[0] not in _FREE and _at(now, k) != _at(before, k)]
    if changed:
        told = [f"{'.'.join(k)} was {_at(before, k)!r}, is {_at(now, k)!r}" for k in sorted(changed)]
        raise ConfigError(
            f"{recipe.place('resume')}: the run in {recipe.output!r} began with another recipe: {listing(told)}."
        )


def _leaves(values: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(values, dict):
        return {path}
    return {leaf for k, v in values.items() for leaf in _leaves(v, (*path, k))}


def _at(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


@dataclass
class Prepared:
    """The data of a run: what the Trainer reads, and the examples that are held out."""

    splits: Splits
    train: Rows
    validation: Rows | None
    encoder: Encoder
    facts: dict[str, Any]
    task: Task

    @property
    def held_out(self) -> dict[str, list[Example]]:
        """The held-out examples, by the name of their part."""
        return {"test": self.splits.test, "validation": self.splits.validation}


def prepare_data(recipe: Recipe, tokenizer: Any, task: Task | None = None) -> Prepared:
    """Read, split and tokenise the recipe's data. `ConfigError` where nothing is left to train on.

    task: the recipe's own, unless given.
    """
    task = task or task_of(recipe)
    splits = _splits(recipe)
    encoder = Encoder(tokenizer, None if recipe.data.chat == "auto" else recipe.data.chat)
    parts: dict[str, list[Example]] = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    task.look([e for examples in parts.values() for e in examples], tokenizer)
    limit = recipe.data.max_length
    facts: dict[str, Any] = {**splits.facts, "sources": recipe.data.source, **task.facts}
    rows: dict[str, list[Feature]] = {}
    for name, examples in parts.items():
        found = [row for e in examples for row in task.features(encoder, e)]
        rows[name] = [r for r in found if all(len(values) <= limit for values in r.values())]
        facts[name] = {
            "examples": len(examples),
            "tokens": sum(len(r[key]) for r in rows[name] for key in r if key.endswith("input_ids")),
            "too_long": len(found) - len(rows[name]),
            "groups": _groups([task.group(e) for e in examples]),
        }
    if not rows["train"]:
        raise ConfigError(f"{recipe.place('data', 'max_length')} = {limit}: every training example is longer.")
    train = task.arranged(rows["train"])
    facts["train"]["rows"] = len(train)
    validation = Rows(rows["validation"]) if rows["validation"] else None
    if recipe.training.patience and validation is None:
        raise ConfigError(f"{recipe.place('training', 'patience')}: needs held-out examples; set data.validation.")
    return Prepared(splits, Rows(train), validation, encoder, facts, task)


def _splits(recipe: Recipe) -> Splits:
    """The examples; an error that names a key of `[data]` says where it stands."""
    try:
        return load_splits(recipe.data, recipe.seed, recipe.folder)
    except ConfigError as error:
        said = str(error.args[0])
        key = re.match(r"data\.(\w+)", said)
        if key is None:
            raise
        raise ConfigError(recipe.place("data", key[1]) + said[key.end() :]) from error


def _groups(names: Sequence[str]) -> dict[str, int]:
    return {n: names.count(n) for n in sorted({*names} - {""})}
