# SPDX-License-Identifier: Apache-2.0
"""Finding adapter files (a directory or the hub), reading them safely, and writing them whole or not at all."""

from __future__ import annotations

import functools
import io
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from . import limits
from .errors import AdapterFileError, AdapterNameError, listing
from .staged import READERS, memory, read_onto
from .tensorfile import SIZES, Entry, Header, header_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def find_file(source: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The local path of the file `name` of an adapter: in a directory, or downloaded from the hub.

    Raises `AdapterFileError`, with what the place does hold, where there is no such file, or it is a link that leads out
    of the directory.
    """
    try:
        return _found(source, name, _below(subfolder), hub)
    except (ValueError, OSError) as error:  # a name that cannot be one: a zero in it, too long
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"can't look for {name!r} at {str(source)[:200]!r}: {error}.") from error


def _found(source: str | os.PathLike[str], name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    folder = Path(source, subfolder) if subfolder else Path(source)
    if (folder / name).is_file():
        check_inside(folder / name, Path(source))
        return folder / name
    if folder.exists() or Path(source).is_absolute() or str(source).startswith("."):
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        state = (
            f"it holds {listing(there)}" if there else ("it is empty" if folder.is_dir() else "there is no such folder")
        )
        raise AdapterFileError(f"can't find {name!r} at {str(folder)!r}: {state}.")
    return _download(str(source), name, subfolder, hub)


def _below(subfolder: str | None) -> str | None:
    """A subfolder, if it is one. Raises `AdapterFileError` for a path that leads out."""
    if subfolder and (PurePath(subfolder).is_absolute() or ".." in PurePath(subfolder.replace("\\", "/")).parts):
        raise AdapterFileError(
            f"subfolder={subfolder!r} leads out of the adapter's directory; name a folder inside it."
        )
    return subfolder


def check_inside(path: Path, folder: Path) -> None:
    """Raise `AdapterFileError` where a path in a directory is, or goes through, a link that leads out of it.

    The hub's cache is a directory of links to files beside it, which belong to the same repository.
    """
    home, real = folder.resolve(), path.resolve()
    cached = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if limits.FOLLOW_LINKS or real.is_relative_to(home) or real.is_relative_to(cached):
        return
    raise AdapterFileError(
        f"{path} is a link that leads out of the adapter's directory, to {real}; put the file itself there, or set "
        "graftlet.limits.FOLLOW_LINKS = True where you made the link yourself."
    )


def check_apart(folder: Path, names: list[str]) -> None:
    """Raise `AdapterNameError` where names differ only in a way that the disk does not see, so one would hide the other."""
    first: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name).casefold()
        if (other := first.setdefault(plain, name)) != name and _alike(folder, name, other):
            raise AdapterNameError(
                f"adapters {other!r} and {name!r} would be saved into the same folder: the disk at {folder} does not tell "
                "their names apart. Rename one (rename_adapter), or save them into different folders."
            )


def _alike(folder: Path, one: str, other: str) -> bool:
    """Whether the disk takes two names for one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".names.") as probe:
        Path(probe, one).mkdir()
        return Path(probe, other).exists()


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
    temporary = write_beside(path, content)
    with dropped_on_error(temporary):
        settle(temporary, path)


def write_beside(path: Path, content: bytes) -> Path:
    """Write `content` to a temporary file in the folder of `path`, flushed to the disk."""
    with _beside(path) as (handle, temporary):
        _write(handle, content)
    return temporary


@contextmanager
def _beside(path: Path) -> Iterator[tuple[int, Path]]:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with dropped_on_error(Path(temporary)):
        try:
            yield handle, Path(temporary)
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def dropped_on_error(temporary: Path) -> Iterator[None]:
    """Take a temporary file away where the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _write(handle: int, content: Any) -> None:
    left = memoryview(content).cast("B")
    while left:
        left = left[os.write(handle, left) :]


def settle(temporary: Path, path: Path) -> None:
    """Put a finished temporary file in its place, durable and readable as an ordinary file would be."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make what was renamed or removed in a folder durable, where the file system can."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class TensorFile:
    """An open file of tensors: its header has been checked, its tensors are read when they are asked for.

    They are read into memory, not mapped: a file that another process cuts short is an error, not the end of this one. The
    open file is the one that was checked, whatever is renamed to its path meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = _open(path)
        self.header: Header = header_in(self.file, path)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata

    def on_meta(self) -> dict[str, Tensor]:
        """Kinds and shapes, as tensors without memory."""
        import torch

        return {
            key: torch.empty(entry.shape, dtype=kind(entry.dtype), device="meta")
            for key, entry in self.header.entries.items()
        }

    def read(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors. Raises `AdapterFileError` where the file has become shorter."""
        import torch

        entries, place = self.header.entries, torch.device(device)
        if sum(e.end - e.start for e in entries.values()) < SEVERAL or not hasattr(os, "preadv"):
            return {key: self._read(entry).to(place) for key, entry in entries.items()}
        if place.type == "cuda":
            return self._read_onto(place)
        with ThreadPoolExecutor(READERS) as pool:  # copying out of the system's memory is what takes the time
            found = pool.map(self._read, entries.values())
            return {key: t.to(place) for key, t in zip(entries, found, strict=True)}

    def _read(self, entry: Entry) -> Tensor:
        import torch

        made, size = torch.empty(entry.shape, dtype=kind(entry.dtype)), entry.end - entry.start
        if size:
            self._fill(memory(made, size), entry.start)
        return made

    def _read_onto(self, device: torch.device) -> dict[str, Tensor]:
        entries = self.header.entries
        content = read_onto(device, max(e.end for e in entries.values()), self._fill)

        def tensor(entry: Entry) -> Tensor:
            own, dtype = content[entry.start : entry.end], kind(entry.dtype)
            own = own if entry.start % dtype.itemsize == 0 else own.clone()
            return own.view(dtype).view(entry.shape)

        return {key: tensor(entry) for key, entry in entries.items()}

    def _fill(self, content: memoryview, at: int) -> None:
        """Fill memory from a place among the file's tensors."""
        left = len(content)
        while left:
            count = self._read_into(content[len(content) - left :], self.header.offset + at)
            if not count:
                raise AdapterFileError(
                    f"{self.path} became shorter while it was read; it is being written, or damaged."
                )
            at, left = at + count, left - count

    def _read_into(self, content: memoryview, place: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [content], place)
        self.file.seek(place)
        return self.file.readinto(content)


SEVERAL = 1 << 24
"""From so many bytes on, a file's tensors are read by several threads."""


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error


def kind(name: str) -> torch.dtype:
    """The dtype that a safetensors header calls so."""
    return _kinds()[name]


@functools.cache
def _kinds() -> dict[str, torch.dtype]:
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    }  # fmt: skip
    plain = {name: name.replace("I", "int").replace("U", "uint") for name in SIZES if name[0] in "IU"}
    return {name: getattr(torch, word) for name, word in {**names, **plain}.items() if word in vars(torch)}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file beside `path`, flushed to the disk, and return where; the caller puts it in its place.

    The same tensors and metadata give the same bytes. Tensors come from their devices one at a time.
    """
    kinds = {dtype: name for name, dtype in _kinds().items()}
    if strange := [f"{key}, {t.dtype}" for key, t in tensors.items() if t.dtype not in kinds or t.is_meta]:
        raise AdapterFileError(f"{listing(strange, 4)}: such tensors cannot be written, or hold nothing.")
    order = sorted(tensors, key=lambda key: (-SIZES[kinds[tensors[key].dtype]], key))  # so each begins where it may
    end, entries = 0, dict[str, Any]()
    for key in order:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    held = {"__metadata__": dict(sorted(metadata.items())), **entries}
    header = json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with _beside(path) as (handle, temporary):
        _write(handle, len(header).to_bytes(8, "little") + header)
        for key in order:
            _write_tensor(handle, tensors[key])
    return temporary


def _write_tensor(handle: int, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if size := tensor.numel() * tensor.element_size():
        _write(handle, memory(tensor, size))


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file (or a pickle of them). `AdapterFileError` names the file when it is damaged."""
    return TensorFile(path).read(device) if path.suffix == ".safetensors" else read_pickle(path, device)


def read_pickle(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a pickle, which may hold nothing else. `AdapterFileError` names the file where it does."""
    import torch

    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except (UnpicklingError, OSError, RuntimeError, ValueError, EOFError, TypeError, KeyError, AttributeError) as error:
        why = str(error).partition("\n")[0]
        raise AdapterFileError(f"{path} cannot be read: {why} It is damaged or not an adapter file.") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise AdapterFileError(f"{path} does not hold a dictionary of tensors; it is not an adapter file.")
    if not all(isinstance(key, str) for key in loaded):
        raise AdapterFileError(f"{path} has keys that are no strings; it is not an adapter file.")
    return loaded
