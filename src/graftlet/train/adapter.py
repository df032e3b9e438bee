# SPDX-License-Identifier: Apache-2.0
"""A trained adapter opened for use: with the base it was trained on, its tokenizer, and the words of its recipe."""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..errors import AdapterFileError, BaseMismatchWarning
from ..model.peft_model import PeftModel
from .base import load_base, load_tokenizer
from .data import Message, fill
from .prepare import SUMMARY
from .recipe import ModelTable, QuantizationTable
from .sources import PACKAGE, model_folder
from .tokens import Encoder


@dataclass
class Opened:
    """An adapter on its base. `system` and `prompt` are the recipe's wording, where it has one for a single text."""

    model: Any
    encoder: Encoder
    base: str
    system: str | None = None
    wording: str | None = None

    def messages(self, text: str, system: str | None = None, raw: bool = False) -> list[Message]:
        """A user's text as the conversation that the adapter was trained to answer; with `raw`, as it stands."""
        asked = text
        if self.wording and not raw:
            column = next(name for _, name, _, _ in string.Formatter().parse(self.wording) if name)
            asked = fill(self.wording, {column: text}, "prompt")
        said = system if system is not None else None if raw else self.system
        return [*([{"role": "system", "content": said}] if said else []), {"role": "user", "content": asked}]


@dataclass
class Placed:
    """Where an adapter's base is, and how it is to be loaded. name: as it was asked for. folder: what can be loaded."""

    config: PeftConfig
    name: str
    folder: str
    table: ModelTable
    summary: dict[str, Any]

    @property
    def quantization(self) -> QuantizationTable | None:
        """How the base was kept as the adapter was trained."""
        table = self.summary.get("recipe", {}).get("quantization")
        return None if table is None else QuantizationTable.model_validate(table)

    @property
    def head(self) -> dict[str, Any]:
        """What the base's class is to be told, so that its head is the one that the adapter was trained with."""
        return self.summary.get("head", {})

    def base(self) -> Any:
        """The base, with a head for the adapter's task."""
        return load_base(
            self.folder, self.table, self.quantization, str(self.config.task_type or "CAUSAL_LM"), self.head
        )

    def tokenizer(self, source: str) -> Any:
        """The adapter's own tokenizer, or the base's."""
        own = Path(source, "tokenizer_config.json").is_file()
        return load_tokenizer(source if own else self.folder, self.table)


def place_adapter(
    source: str, base: str | None, dtype: str | None, device: str, report: Callable[[str], None] = lambda _: None
) -> Placed:
    """Find an adapter's base. Arguments and errors are those of `open_adapter`."""
    config, summary = PeftConfig.from_pretrained(source), summary_of(source)
    trained: dict[str, Any] = summary.get("model", {})
    name = base or _base(config.base_model_name_or_path, trained.get("source"), source)
    table = ModelTable.model_validate(
        {"source": name, "dtype": dtype or trained.get("dtype", "auto"), "device": device, "revision": config.revision}
    )
    return Placed(config, name, model_folder(name, report), table, summary)


def open_adapter(
    source: str,
    base: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> Opened:
    """Load an adapter and its base.

    Args:
        source: an adapter's folder or hub id.
        base: another place of the base model than the one its config names.
        dtype: float32, bfloat16, float16 or auto; None: as it was trained.

    Raises:
        AdapterFileError: no adapter there, or its base is not named or not found.
    """
    placed = place_adapter(source, base, dtype, device, report)
    name, tokenizer = placed.name, placed.tokenizer(source)
    with warnings.catch_warnings():
        if name != placed.config.base_model_name_or_path:  # said on purpose, or the very base at a new place
            warnings.simplefilter("ignore", BaseMismatchWarning)
        model: Any = PeftModel.from_pretrained(placed.base(), source)
    model.eval()
    words = placed.summary.get("recipe", {}).get("data", {})
    chat = words.get("chat", "auto")
    encoder = Encoder(tokenizer, None if chat == "auto" else chat)
    return Opened(model, encoder, name, _fixed(words.get("system")), _single(words.get("prompt")))


def summary_of(source: str) -> dict[str, Any]:
    """What the summary beside an adapter says; nothing where there is none."""
    path = Path(source, SUMMARY)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _base(named: str | None, trained_on: str | None, source: str) -> str:
    """The base that the config names; where that was a folder which is gone, the source that the recipe had."""
    if named and (Path(named).exists() or not Path(named).is_absolute()):
        return named
    if trained_on and (trained_on.startswith(PACKAGE) or Path(trained_on).exists()):
        return trained_on
    what = f"its base model {named!r} is not there" if named else "its config names no base model"
    raise AdapterFileError(f"{source}: {what}; say where it is with --base.")


def _columns(template: str | None) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None]


def _fixed(template: str | None) -> str | None:
    return fill(template, {}, "system") if template and not _columns(template) else None


def _single(template: str | None) -> str | None:
    return template if len(_columns(template)) == 1 else None
