# SPDX-License-Identifier: Apache-2.0
"""What an adapter's directory contains, and whether it would load: by the standard library alone, without torch.

The config's fields are checked as far as they can be without its method, which needs torch: that is done at the load, and
so is whether the adapter fits a base.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import pair, patterns
from .config import Excludes, Layers, PeftType, Saves, Targets, TaskType, conforms, hints, parsed
from .errors import AdapterFileError, GraftletError, listing, nearest, shown
from .files import check_inside
from .tensorfile import first_unfinite, read_header

EXPECTED = {pair.CONFIG, pair.WEIGHTS, pair.PICKLE, pair.SUMS, pair.JOURNAL, "README.md"}
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".pkl", ".pickle", ".pt", ".pth")
"""Files that are code, or can run some as they are read. A load reads none of them."""
PATTERNED = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")


@dataclass
class Findings:
    """What a directory is, what is wrong with it (it would not load), and what one should know."""

    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """It as plain values."""
        return {**asdict(self), "sound": self.sound}

    def take(self, work: Callable[[], None]) -> None:
        """Do one check; what it raises is what is wrong."""
        try:
            work()
        except GraftletError as error:
            self.wrong.append(str(error.args[0]))


def verify(folder: str | os.PathLike[str]) -> Findings:
    """Look into a directory. Nothing in it is run, imported or loaded, and a lie in it costs neither time nor memory."""
    found = Findings(str(folder))
    path = Path(folder)
    if not path.is_dir():
        found.wrong.append(f"{folder} is no directory.")
        return found
    for work in (_files, _config, _weights, _sums):
        found.take(lambda work=work: work(path, found))
    return found


def _files(folder: Path, found: Findings) -> None:
    names = sorted(p.name for p in folder.iterdir())
    found.facts["files"] = names[:100]
    for path in sorted(folder.iterdir()):
        if path.name in EXPECTED:
            check_inside(path, folder)
        elif path.suffix in CODE:
            found.notes.append(f"{path.name} can hold code; a load does not read it.")
        elif path.is_dir() and (path / pair.CONFIG).is_file():
            found.notes.append(f"{path.name}/ is another adapter; verify it for itself.")
    if pair.JOURNAL in names:
        found.notes.append("a save was killed here; the pair of files that it left whole is the one described.")


def _config(folder: Path, found: Findings) -> None:
    path = folder / pair.CONFIG
    if not path.is_file():
        raise AdapterFileError(f"{folder} has no {pair.CONFIG}.")
    values = parsed(pair.read_config(path), path)
    kind = str(values.get("peft_type")).upper()
    if kind not in PeftType.__members__:
        found.wrong.append(
            f"peft_type={shown(values.get('peft_type'))} is no method that is known{nearest(kind, PeftType)}"
        )
    task = values.get("task_type")
    if task is not None and task not in [t.value for t in TaskType]:
        found.wrong.append(f"task_type={shown(task)} is none; allowed: {listing(t.value for t in TaskType)}.")
    found.facts |= {
        "method": kind,
        "task": task,
        "base": values.get("base_model_name_or_path"),
        "settings": {k: v for k, v in values.items() if v not in (None, False, [], {}) and len(str(v)) < 200},
    }
    for name, value in values.items():
        found.take(lambda name=name, value=value: _check_field(name, value))
    found.notes += list(_told(values))


_COUNTS = re.compile(r"r|rank_pattern|.*_r|r_.*|.*rank|num_.*|n_.*|u|.*_size|.*_length")


COMMON = {name: hint for kind in (Targets, Excludes, Layers, Saves) for name, hint in hints(kind).items()}
"""The types of the fields that methods share; `_config` looks at two of them by themselves."""
del COMMON["peft_type"], COMMON["task_type"]


def _check_field(name: str, value: Any) -> None:
    """What holds for a field of this name in any method."""
    if name in COMMON and not conforms(value, COMMON[name]):
        raise AdapterFileError(f"{name}={shown(value)} is a {type(value).__name__}, which it cannot be.")
    regexes = list(value) if isinstance(value, dict) and name.endswith("_pattern") else []
    if isinstance(value, str) and name in PATTERNED:
        regexes.append(value)
    for regex in regexes[:1000]:
        patterns.check(regex, name)
    held = value.values() if name == "rank_pattern" and isinstance(value, dict) else [value]
    for number in held:
        if isinstance(number, (int, float)) and _COUNTS.fullmatch(name) and abs(number) > 10**8:
            raise AdapterFileError(f"{name}={shown(number)} is absurd.")
    for rank in held if name in ("r", "rank_pattern") else ():
        if rank is not None and not isinstance(rank, list) and not _is_rank(rank, share=name != "r"):
            raise AdapterFileError(f"{name}={shown(rank)}: a rank is a number from 0 up.")
    if isinstance(value, float) and value - value != 0:
        raise AdapterFileError(f"{name}={value} is not finite.")


def _is_rank(value: Any, share: bool) -> bool:
    """Whether a value may be a rank. share: also a share of the full one, as a layer's own may be."""
    kinds = (int, float) if share else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= 0


def _told(values: dict[str, Any]) -> Iterator[str]:
    mapping = values.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if isinstance(library, str) and not library.startswith("transformers"):
        yield f"auto_mapping names the module {shown(library)}; it is not imported because a file names it."
    for name in ("megatron_core", "tokenizer_kwargs"):
        if values.get(name) not in (None, "megatron.core", {}):
            yield f"{name}={shown(values[name])} is not followed."


def _weights(folder: Path, found: Findings) -> None:
    path = folder / pair.WEIGHTS
    if not path.is_file():
        if (folder / pair.PICKLE).is_file():
            raise AdapterFileError(
                f"the weights are a pickle, {pair.PICKLE}, which is loaded with allow_pickle=True alone."
            )
        raise AdapterFileError(f"{folder} has no {pair.WEIGHTS}.")
    header = read_header(path)
    found.facts["tensors"] = len(header.entries)
    found.facts["numbers"] = header.elements
    found.facts["kinds"] = sorted({entry.dtype for entry in header.entries.values()})
    found.facts["bytes"] = path.stat().st_size
    with path.open("rb") as file:
        if (key := first_unfinite(file, header)) is not None:
            found.wrong.append(f"{shown(key)} holds NaN or Inf.")
    if (folder / pair.CONFIG).is_file() and not pair.belongs(
        pair.digest(pair.read_config(folder / pair.CONFIG)), header.metadata
    ):
        found.notes.append(
            "the config is not the one that the weights were saved with: of another save, or edited since."
        )
    if (recorded := header.metadata.get("base_fingerprint")) is not None:
        found.facts["base_fingerprint"] = _layers(recorded)


def _layers(recorded: str) -> str | None:
    try:
        return str(json.loads(recorded)["layers"])[:8]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _sums(folder: Path, found: Findings) -> None:
    if (folder / pair.SUMS).is_file():
        pair.check_sums(folder)
        found.notes.append(f"the files are those of {pair.SUMS}.")
