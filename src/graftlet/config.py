# SPDX-License-Identifier: Apache-2.0
"""Adapter configurations: dataclasses in memory, `adapter_config.json` on disk.

A config is checked when it is made: every field's type against its annotation, every value by `check`. Nothing is
imported or fetched because a file names it.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import os
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from typing_extensions import Self

from . import limits
from .errors import (
    AdapterFileError,
    ConfigError,
    PatternOrderWarning,
    UnknownFieldWarning,
    listing,
    nearest,
    shown,
    warn,
)
from .files import find_file, write_atomically
from .pair import digest, read_config
from .patterns import endings
from .registry import lookup
from .tensorfile import deeper, once

CONFIG_NAME = "adapter_config.json"
REFERENCE_VERSION = "0.21.2"
"""The reference version whose file format is written; it stands in the file as `peft_version`."""


class TaskType(str, enum.Enum):
    """What the model is for; decides the class that `get_peft_model` returns."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    __str__ = str.__str__


class PeftType(str, enum.Enum):
    """The method names of the file format."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"

    __str__ = str.__str__


Names = list[str] | set[str] | tuple[str, ...] | str
"""Module names: a collection matches by exact name or dotted suffix, a string is a regex over the whole path."""


@dataclass(kw_only=True)
class PeftConfig:
    """What every adapter's configuration has. A method's own config derives from this and from the mixins below."""

    peft_type_name: ClassVar[str] = ""
    is_prompt_learning: ClassVar[bool] = False
    not_saved: ClassVar[tuple[str, ...]] = ("runtime_config",)
    unites: ClassVar[tuple[str, ...]] = ("target_modules",)
    """Fields with names of modules of which a combination of adapters takes all that one of them has."""
    reads_patterns: ClassVar[bool] = True
    """The keys of `rank_pattern` and `alpha_pattern`, where there are such fields, name ends of paths."""

    was_read = False
    """Whether it stood in a file, or a dictionary, rather than in code."""
    digest = ""
    """Of the text that it was read from."""

    needs_steps: ClassVar[str | None] = None
    """The field, if there is one, that says how many steps training will take."""

    if TYPE_CHECKING:
        target_modules: Names | None
        exclude_modules: Names | None
        layers_to_transform: list[int] | int | None
        layers_pattern: list[str] | str | None
        modules_to_save: list[str] | tuple[str, ...] | set[str] | None
        target_parameters: list[str] | None
        trainable_token_indices: list[int] | dict[str, list[int]] | None
        layer_replication: list[tuple[int, int]] | list[list[int]] | None
        ensure_weight_tying: bool
        bias: str
    else:  # common fields that a method's config may lack read as these
        target_modules = exclude_modules = layers_to_transform = layers_pattern = modules_to_save = None
        target_parameters = trainable_token_indices = layer_replication = None
        ensure_weight_tying = False
        bias = "none"

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(kwargs) - names):
            raise ConfigError(
                f"{cls.__name__} has no field {unknown[0]!r}{nearest(unknown[0], names)} "
                f"Fields: {listing(sorted(names), 60)}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.peft_type_name:
            self.peft_type = PeftType.__members__.get(self.peft_type_name, self.peft_type_name)
        if self.task_type is not None:
            self.task_type = _task_type(self.task_type)
        for f in fields(self):
            _check_field(self, f.name)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        _check_targets(self)
        _check_overlaps(self)
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where the values do not go together. A method's config overrides this."""

    def check_file(self, values: dict[str, Any], origin: str) -> None:
        """Raise `ConfigError` where a file asks for what code alone may ask for. A method's config overrides this."""

    def require(self, condition: bool, message: str) -> None:
        """Raise `ConfigError` with `message`, under this class's name, unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")

    @property
    def brings(self) -> dict[str, str]:
        """Adapters that this one works with, by name: where each is saved. They are loaded before it."""
        return {}

    @property
    def teaches(self) -> bool:
        """Whether those adapters learn along with it."""
        return False

    @property
    def picky(self) -> bool:
        """Whether this adapter cannot stand beside just any other: its method is asked (`Method.meet`)."""
        return False

    def dispute(self, message: str) -> None:
        """Raise `ConfigError` with `message`; where the config was read, and so meant something to its writer, warn."""
        if not self.was_read:
            raise ConfigError(f"{type(self).__name__}.{message}")
        warn(PatternOrderWarning, f"{type(self).__name__}.{message}", stacklevel=6)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """The text of `adapter_config.json`: keys sorted, but for patterns, whose order counts; sets as sorted lists."""
        values = {k: v for k, v in self.to_dict().items() if k not in self.not_saved}
        values["peft_version"] = self.peft_version or REFERENCE_VERSION
        return json.dumps(_sorted(values), indent=2, default=_plain)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, whole or not at all."""
        folder = Path(save_directory)
        if folder.is_file():
            raise AdapterFileError(f"{folder} is a file; a directory is needed to save an adapter into.")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_NAME, (self.to_json() + "\n").encode())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the config of a saved adapter: a directory, or a repository id on the hub.

        The class returned is the one of the file's `peft_type`. Fields this version does not know are named in an
        `UnknownFieldWarning` and ignored.

        Raises:
            AdapterFileError: no such file, or not a JSON object.
            UnknownMethodError: `peft_type` names no method.
            ConfigError: a field has a wrong type or value.
        """
        hub = {k: kwargs.pop(k) for k in list(kwargs) if k in _HUB_ARGUMENTS}
        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        text = read_config(path)
        values = parsed(text, path)
        made = cls.from_dict({**values, **kwargs}, origin=str(path))
        made.check_file(values, str(path))
        made.digest = digest(text)
        return made

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The plain dictionary of a config file."""
        return read_json(Path(path_json_file))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "the given dictionary") -> PeftConfig:
        """The config that a dictionary describes; its class follows `peft_type` (or is `cls` where that is missing)."""
        kind = values.get("peft_type") or cls.peft_type_name
        if not kind:
            raise ConfigError(f"{origin} has no peft_type; it names the method, for instance LORA.")
        known = lookup(kind).config
        made: PeftConfig = object.__new__(known)
        made.was_read = True
        made.__init__(**{k: v for k, v in _known(known, values, origin).items() if k != "peft_type"})
        return made

    @classmethod
    def from_peft_type(cls, **values: Any) -> PeftConfig:
        """The config of keyword arguments, its class by `peft_type`."""
        return cls.from_dict(values)


@dataclass(kw_only=True)
class Targets(PeftConfig):
    """`target_modules`: which layers are adapted. None takes the method's default for the model's type."""

    target_modules: Names | None = None


@dataclass(kw_only=True)
class Excludes(PeftConfig):
    """`exclude_modules`: layers left alone although `target_modules` matches them."""

    exclude_modules: Names | None = None


@dataclass(kw_only=True)
class Layers(PeftConfig):
    """`layers_to_transform`, `layers_pattern`: only the blocks with these indices, in the list of this name."""

    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


@dataclass(kw_only=True)
class Saves(PeftConfig):
    """`modules_to_save`: modules trained whole, as copies, and saved with the adapter."""

    modules_to_save: list[str] | tuple[str, ...] | set[str] | None = None


@dataclass(kw_only=True)
class FanInFanOut(PeftConfig):
    """`fan_in_fan_out`: kept in the format. Graftlet reads the layout off the layer and ignores it."""

    fan_in_fan_out: bool = False


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """What prompt methods share. The sizes left None are read off the model's config."""

    is_prompt_learning: ClassVar[bool] = True

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | tuple[str, ...] | set[str] | None = None


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dictionary describes, its class by `peft_type`."""
    return PeftConfig.from_dict(config_dict)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most `limits.MAX_CONFIG_BYTES`; `AdapterFileError` names the file otherwise."""
    return parsed(read_config(path), path)


def parsed(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that the text of a file is. Raises `AdapterFileError`, which names the file."""
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {str(error) or type(error).__name__}.") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} holds a JSON {type(values).__name__}; an object of config fields is needed.")
    if deeper(values, limits.MAX_CONFIG_LEVELS):
        raise AdapterFileError(f"{path} is nested more than {limits.MAX_CONFIG_LEVELS} levels deep; a config is not.")
    return values


_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "use_auth_token", "force_download", "local_files_only", "repo_type")


def _known(cls: type[PeftConfig], values: dict[str, Any], origin: str) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        hints = "".join(nearest(u, names) for u in unknown[:1])
        warn(
            UnknownFieldWarning,
            f"{origin}: {cls.__name__} does not know {listing(unknown)}{hints}; ignored. "
            "A newer version may have written the file.",
            stacklevel=5,
        )
    return {k: v for k, v in values.items() if k in names}


def _sorted(values: dict[str, Any]) -> dict[str, Any]:
    """A dictionary with its keys sorted, and theirs; the first key of a pattern that matches counts, so they stay in order."""
    deeper = {k: _sorted(v) if isinstance(v, dict) and not k.endswith("_pattern") else v for k, v in values.items()}
    return dict(sorted(deeper.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} has no place in JSON")


def _task_type(value: object) -> TaskType:
    try:
        return TaskType(value)
    except ValueError:
        allowed = [t.value for t in TaskType]
        raise ConfigError(
            f"task_type={shown(value)}{nearest(str(value), allowed)} Allowed: {listing(allowed)}."
        ) from None


def _check_targets(config: PeftConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, dict) and len(value) > limits.MAX_PATTERN_ENTRIES:
            raise ConfigError(
                f"{type(config).__name__}.{name} has {len(value):,} entries; at most {limits.MAX_PATTERN_ENTRIES:,} are "
                "read. If they are meant, raise graftlet.limits.MAX_PATTERN_ENTRIES."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("layers_pattern is given without layers_to_transform; it has no effect alone.")
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name} cannot go with target_modules={config.target_modules!r}, a regex: "
                    "write the layers into the regex, or give target_modules as a list of names."
                )


def _check_overlaps(config: PeftConfig) -> None:
    """Dispute a key of a pattern that ends in an earlier one, which leaves it nothing: the first that matches counts."""
    for name, patterns in vars(config).items():
        if not (config.reads_patterns and name.endswith("_pattern") and isinstance(patterns, dict)):
            continue
        before: dict[str, Any] = {}
        for key, value in patterns.items():
            for end in endings(key):
                if end in before and before[end] != value:
                    config.dispute(
                        f"{name} has {key!r} after {end!r}, which matches all that it does and comes first; put the longer "
                        "one before it."
                    )
            before.setdefault(key, value)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a config class's fields."""
    return typing.get_type_hints(cls)


def _check_field(config: PeftConfig, name: str) -> None:
    hint, value = hints(type(config))[name], getattr(config, name)
    made = _dataclass_in(hint) if isinstance(value, dict) else None
    if made is not None and (value or not conforms(value, hint)):
        value = _nested(made, value, f"{type(config).__name__}.{name}")
        setattr(config, name, value)
    if not conforms(value, hint):
        allowed = str(hint).replace("typing.", "").replace("graftlet.config.", "")
        raise ConfigError(
            f"{type(config).__name__}.{name}={shown(value)} is a {type(value).__name__}; allowed: {allowed}."
        )


def _nested(made: type, values: dict[str, Any], where: str) -> Any:
    """A config inside another. Raises `ConfigError` for fields that it has not, and for wrong types and values."""
    known = {f.name for f in fields(made)}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ConfigError(
            f"{where} has no field {shown(unknown[0])}{nearest(unknown[0], known)} Fields: {listing(known)}."
        )
    for key, value in values.items():
        if not conforms(value, hints(made)[key]):
            raise ConfigError(f"{where}: {key}={shown(value)} is a {type(value).__name__}; that is not allowed there.")
    try:
        return made(**values)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}={shown(values)}: {error}") from error


def _dataclass_in(hint: Any) -> type | None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((o for o in options if is_dataclass(o) and isinstance(o, type)), None)


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: unions, literals and containers included; NaN is no float."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(conforms(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(k, args[0]) and conforms(v, args[1]) for k, v in value.items())
    if origin is tuple and args[-1] is not Ellipsis:
        right = isinstance(value, (tuple, list)) and len(value) == len(args)
        return right and all(map(conforms, value, args))
    if origin in (list, set, tuple):
        return isinstance(value, origin) and all(conforms(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, hint)
