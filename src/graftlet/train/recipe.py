# SPDX-License-Identifier: Apache-2.0
"""A recipe: everything that decides a training run, in one TOML file, checked before anything is loaded.

    recipe = load_recipe("examples/recipes/sms-spam.toml", ["training.learning_rate=1e-4", "output=runs/a"])

An unknown key, a wrong type or a value out of range raises `ConfigError` with file, line and the nearest right key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..errors import ConfigError, listing, nearest
from . import locate
from .rules import complaints

Size = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)]
"""A number of examples, or a share of all of them."""
Count = Annotated[int, Field(ge=1)]
Every = Annotated[int, Field(ge=1)] | Literal["epoch"]


class Table(BaseModel):
    """A table of a recipe: no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelTable(Table):
    """`[model]`: the base model, which stays as it is."""

    source: str
    """A folder, a hub id, or `package:DIST` for a GGUF file inside an installed Python package."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is bfloat16 on a device that computes in it, else float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """CPU threads; `auto` takes the cores that are free, for a busy one stalls all the others."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    chat_template: str | None = None
    """A Jinja template, or the path of one, in place of the tokenizer's own."""


class AdapterTable(Table):
    """`[adapter]`: a method, and any field of that method's config class."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    method: str = "lora"
    init: str | bool | None = None
    """Short for the method's own name of it, such as `init_lora_weights`."""

    @property
    def fields(self) -> dict[str, Any]:
        """The method's fields as given, without `method` and `init`."""
        return dict(self.model_extra or {})


class QuantizationTable(Table):
    """`[quantization]`: the base's linear layers kept in few bits by bitsandbytes, which the adapter is trained on (QLoRA)."""

    method: Literal["nf4", "fp4", "int8"]
    """4 bits with levels for normally distributed weights, 4 bits as floats, or 8 bits (LLM.int8)."""
    double: bool = True
    """Quantise the scales of 4 bits as well: 0.4 bits an element less."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What 4-bit layers compute in; `auto` is the model's dtype."""
    skip: list[str] = []
    """Names of layers that are left as they are. The output head is, unless others are named."""


class Filter(Table):
    """One `[[data.where]]`: rows that do not satisfy all of it are left out."""

    column: str
    equals: str | int | float | bool | None = None
    one_of: list[str | int | float | bool] | None = None
    contains: str | None = None
    min_chars: int | None = None
    max_chars: int | None = None


class DataTable(Table):
    """`[data]`: rows from files, turned into conversations, and split into what is trained on and what is held out."""

    source: str | list[str]
    """A file, `package:DIST:path/in/package.csv`, or a dataset id of the hub. `*` in a file's name takes several."""
    validation_source: str | list[str] | None = None
    test_source: str | list[str] | None = None
    format: str = "auto"
    """`auto` goes by the file's name: jsonl, json, csv, tsv, parquet. Others: chatterbot, bfcl, hub."""
    subset: str | None = None
    split: str = "train"
    """`subset` and `split` name a part of a dataset of the hub."""
    messages: str | None = None
    """The column that holds a conversation: a list of `{role, content}`."""
    system: str | None = None
    prompt: str | None = None
    completion: str | None = None
    """Templates over a row's columns: `"Is this spam? {text}"`. Default: `{prompt}` and `{completion}`."""
    rejected: str | None = None
    """For tasks `dpo`, `reward` and `embedding`: a template of an answer that is worse than `completion`."""
    label: str | None = None
    """For task `classification`: the column of the labels. Names and whole numbers are classes, other numbers are amounts."""
    chat: bool | Literal["auto"] = "auto"
    """Whether the model's chat template is used; `auto`: where it has one."""
    values: dict[str, dict[str, str]] = {}
    """New words for a column's values: `values.spam = {0 = "ham", 1 = "spam"}`."""
    where: list[Filter] = []
    dedupe: bool = True
    """Keep one row of those with the same prompt, so that nothing held out was trained on."""
    balance: str | None = None
    """A column: as many rows of each of its values, in every split."""
    shuffle: bool = True
    train: Size | None = None
    validation: Size = 0
    test: Size = 0
    """How many; `train` takes what is left unless it is given."""
    max_length: Count = 1024
    """Tokens. A longer example is left out, and counted in the summary."""


class TrainingTable(Table):
    """`[training]`: the optimisation."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Count = 8
    accumulation: Count = 1
    """Batches a step: the effective batch is `batch_size * accumulation`."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    optimizer: str = "adamw_torch"
    """One of transformers' names, or one made for LoRA: loraplus, lorafa, riemannian."""
    optimizer_options: dict[str, Any] = {}
    """Of loraplus: `ratio` (16), `embedding_lr`, `base` (AdamW, or any class of torch or bitsandbytes, such as AdamW8bit); of
    lorafa: `base`; of riemannian: `reg` (0.01), `base`. Whatever else is given goes to the optimiser's class."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast. Not needed where the model itself is loaded as bfloat16: the adapter is float32 all the same."""
    packing: bool = False
    """Fill rows of `data.max_length` with several examples, which do not see each other."""
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    """Put examples of about the same length into a batch, so that little of it is filling."""
    log_every: Count = 5
    evaluate_every: Every | None = None
    save_every: Every | None = None
    """In steps, or "epoch". `save_every` is `evaluate_every` unless given, and must be where `patience` is."""
    keep: Count = 2
    """Checkpoints kept."""
    patience: Count | None = None
    """Stop after so many evaluations without a better validation loss, and keep the best adapter."""
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where the figures of each log line go as well. TensorBoard's stand in `logs` in the output folder."""
    arguments: dict[str, Any] = {}
    """Any other field of `transformers.TrainingArguments`."""

    @model_validator(mode="after")
    def _goes_together(self) -> TrainingTable:
        if self.patience and not self.evaluate_every:
            raise ValueError("patience needs evaluate_every: how often the validation loss is looked at")
        if self.patience and self.save_every not in (None, self.evaluate_every):
            raise ValueError("patience needs save_every to be evaluate_every, so that the best adapter can be kept")
        return self


class PreferenceTable(Table):
    """`[preference]`: task `dpo`, which learns from pairs of answers. The reference is the base, the adapter off."""

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """How far the model may go from the reference; the smaller, the further."""


class EvaluationTable(Table):
    """`[evaluation]`: what is measured on held-out examples before and after."""

    metric: Literal["none", "choice", "exact_match", "json_match", "function_call"] = "none"
    choices: list[str] = []
    """For `choice`: the answers allowed; the one whose first token is likeliest is the model's."""
    on: Literal["test", "validation"] = "test"
    batch_size: Count = 16
    max_new_tokens: Count = 64
    samples: Annotated[int, Field(ge=0)] = 4
    """Answers shown before and after."""
    verify: bool = False
    """Measure again after saving and loading into a fresh base, and after merging."""

    @model_validator(mode="after")
    def _goes_together(self) -> EvaluationTable:
        if self.metric == "choice" and len(set(self.choices)) < 2:
            raise ValueError("metric = 'choice' needs choices, at least two different answers")
        return self


class File(Table):
    """The whole of a recipe's file."""

    _folder: Path = PrivateAttr(default=Path())
    _lines: dict[locate.Path, int] = PrivateAttr(default_factory=dict)
    _file: str = PrivateAttr(default="")

    @property
    def folder(self) -> Path:
        """The folder of the recipe's file: relative data paths are looked for there too."""
        return self._folder

    def place(self, *path: str | int) -> str:
        """`FILE:LINE: KEY` of a key, as far as they are known: the beginning of an error message."""
        return _place(self._file, self._lines, path)


class Recipe(File):
    """A training run. Made by `load_recipe`, or in Python from nested dictionaries or these classes."""

    output: str
    """The folder that becomes the adapter: its files, the report, the summary and the checkpoints."""
    overwrite: bool = False
    resume: bool = False
    seed: int = 0
    title: str = ""
    task: Literal["sft", "dpo", "reward", "embedding", "classification"] = "sft"
    """What is learnt: answers, which of two answers is better, how good one is, which texts belong together, or a label."""
    model: ModelTable
    adapter: AdapterTable = AdapterTable()
    quantization: QuantizationTable | None = None
    data: DataTable
    training: TrainingTable = TrainingTable()
    preference: PreferenceTable | None = None
    evaluation: EvaluationTable = EvaluationTable()

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        found = list(complaints(self))
        if found:
            key, said = found[0]
            raise PydanticCustomError("task", "{said}", {"said": said, "at": tuple(key.split("."))})
        return self


def load_recipe(file: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a TOML file, with `key=value` overrides: `training.epochs=2`, or `epochs=2` where one key has it.

    Raises:
        ConfigError: the file is missing or no TOML, or a key or a value is wrong; with file, line and the right key.
    """
    return load_file(Recipe, file, overrides)


F = TypeVar("F", bound=File)


def load_file(kind: type[F], file: str | Path, overrides: Iterable[str] = ()) -> F:
    """A recipe of any kind, as `load_recipe` loads one of training."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        values = locate.parse(text)
    except OSError as error:
        raise ConfigError(f"the recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: this is no TOML: {error}.") from error
    lines = locate.key_lines(text)
    for override in overrides:
        _override(kind, values, lines, override)
    return checked(kind, values, str(path), lines)


def check(values: dict[str, Any], file: str = "", lines: dict[locate.Path, int] | None = None) -> Recipe:
    """The recipe of nested dictionaries; `ConfigError` names every wrong key."""
    return checked(Recipe, values, file, lines)


def checked(kind: type[F], values: dict[str, Any], file: str = "", lines: dict[locate.Path, int] | None = None) -> F:
    """A recipe of any kind, as `check` makes one of training."""
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        found = lines or {}
        said = [_explain(kind, e, file, found) for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(said))) from None
    recipe._folder, recipe._lines, recipe._file = Path(file).parent, lines or {}, file
    return recipe


_UNION_MEMBER = re.compile(r"constrained-|literal\[|list\[|(?:int|float|str|bool)$")
"""What pydantic adds to a path for each member of a union that it tried: no key of a recipe."""


def _place(file: str, lines: dict[locate.Path, int], path: Sequence[str | int]) -> str:
    line = locate.line_of(lines, tuple(path))
    where = "" if not file else f"{file}:{line}: " if line else f"{file}: "
    if line == 0:
        where = "command line: "
    return where + ".".join(map(str, path))


def _explain(kind: type[File], error: Any, file: str, lines: dict[locate.Path, int]) -> str:
    path = tuple(p for p in error["loc"] if not _UNION_MEMBER.match(str(p))) or error.get("ctx", {}).get("at", ())
    place = _place(file, lines, path)
    if error["type"] == "extra_forbidden":
        allowed = sorted(_table_at(kind, path[:-1]).model_fields)
        return f"{place}: there is no such key{nearest(str(path[-1]), allowed) or '.'} Allowed: {listing(allowed, 40)}."
    if error["type"] == "missing":
        return f"{place}: this key is missing."
    said = error["msg"].removeprefix("Value error, ")
    if not path:
        return f"{file}: {said}." if file else f"{said}."
    return f"{place}: {said}." if isinstance(error["input"], dict) else f"{place} = {error['input']!r}: {said}."


def _table_at(kind: type[File], path: Sequence[str | int]) -> type[BaseModel]:
    table: type[BaseModel] = kind
    for name in path:
        if isinstance(name, str):
            table = _tables(table)[name]
    return table


def _tables(table: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The tables inside a table, by key."""
    found = {}
    for name, field in table.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = kind
    return found


def _override(kind: type[File], values: dict[str, Any], lines: dict[locate.Path, int], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"command line: {text!r} is no override; write it as key=value, such as output=runs/a.")
    path = _long_key(kind, key.strip())
    table = values
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"command line: {key}: {name!r} is no table.")
    table[path[-1]] = locate.parse_value(value.strip())
    lines[path] = 0


def _long_key(kind: type[File], key: str) -> tuple[str, ...]:
    path = tuple(key.split("."))
    if len(path) > 1 or key in kind.model_fields:
        return path
    owners = [name for name, table in _tables(kind).items() if key in table.model_fields]
    if len(owners) == 1:
        return owners[0], key
    if owners:
        raise ConfigError(f"command line: {key!r} is ambiguous: {' or '.join(f'{o}.{key}' for o in owners)}?")
    known = {*kind.model_fields, *(k for t in _tables(kind).values() for k in t.model_fields)}
    own = f" A field of the adapter's method is written adapter.{key}=..." if kind is Recipe else ""
    raise ConfigError(f"command line: {key}: there is no such key{nearest(key, known) or '.'}{own}")
