# SPDX-License-Identifier: Apache-2.0
"""Finding adapter files (a directory or the hub), reading their headers, and writing them whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from .errors import AdapterFileError, listing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def find_file(source: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The local path of the file `name` of an adapter: in a directory, or downloaded from the hub.

    Raises `AdapterFileError`, with what the place does hold, where there is no such file.
    """
    folder = Path(source, subfolder) if subfolder else Path(source)
    if (folder / name).is_file():
        return folder / name
    if folder.exists() or Path(source).is_absolute() or str(source).startswith("."):
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        state = (
            f"it holds {listing(there)}" if there else ("it is empty" if folder.is_dir() else "there is no such folder")
        )
        raise AdapterFileError(f"can't find {name!r} at {str(folder)!r}: {state}.")
    return _download(str(source), name, subfolder, hub)


def _download(repo: str, name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, subfolder=subfolder, **hub))
    except Exception as error:
        where = f"{repo}/{subfolder}" if subfolder else repo
        raise AdapterFileError(
            f"can't find {name!r} at {where!r}: there is no such folder here, and the hub answered: {error}"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    The file gets the permissions that an ordinary write would give it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        settle(Path(temporary), path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def settle(temporary: Path, path: Path) -> None:
    """Put a finished temporary file in its place, durable and readable as an ordinary file would be."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
    with suppress(OSError):  # not every file system can sync a directory
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file (or a pickle of them). `AdapterFileError` names the file when it is damaged."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        loaded = torch.load(path, map_location=device, weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, EOFError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise AdapterFileError(f"{path} cannot be read: {why} It is damaged or not an adapter file.") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise AdapterFileError(f"{path} does not hold a dictionary of tensors; it is not an adapter file.")
    return loaded
