# SPDX-License-Identifier: Apache-2.0
"""An adapter's config and weights as one: saved in one transaction, and told apart when they are not of one save.

The weights' metadata carry the digest of the config's text, and are renamed into place last. Between the two renames stands
a journal, with the config that the old weights belong to. So a reader finds the old pair or the new one, wherever a save
was killed; readers that do not know the journal see files that they know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from . import limits
from .errors import AdapterFileError, MixedFilesWarning, warn
from .files import dropped_on_error, settle, sync_folder, write_atomically, write_beside
from .tensorfile import read_header

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
JOURNAL, SUMS = ".adapter_config.json.journal", "SHA256SUMS"
DIGEST = "config_sha256"
"""In the weights' metadata: the digest of the config that they belong to."""

BESIDE = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type", "peft_version")
"""Fields that may be edited without another meaning of the weights."""

Write = Callable[[Path, Mapping[str, str]], Path]


def digest(config: bytes) -> str:
    """SHA-256 of what a config says of its weights, however it is written; not of the base's name and the like."""
    try:
        held = json.loads(config)
        said = json.dumps({k: v for k, v in held.items() if k not in BESIDE}, sort_keys=True).encode()
    except (ValueError, AttributeError, RecursionError):
        said = config
    return sha256(said).hexdigest()


def read_config(path: Path) -> bytes:
    """The text of a config: the one in the journal, where a save was killed after it had replaced this one alone."""
    text = _read(path)
    journal = path.with_name(JOURNAL)
    if path.name != CONFIG or not journal.is_file():
        return text
    try:
        held = json.loads(_read(journal))
        old = held["old"].encode()
        return old if held["new"] == digest(text) and not _arrived(path.parent, held) else text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, AdapterFileError):
        return text


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > limits.MAX_CONFIG_BYTES:
            raise AdapterFileError(
                f"{path} is larger than {limits.MAX_CONFIG_BYTES:,} bytes; no adapter config is. If this one is, raise "
                "graftlet.limits.MAX_CONFIG_BYTES."
            )
        return path.read_bytes()
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error


def _arrived(folder: Path, journal: Mapping[str, str]) -> bool:
    """Whether the weights that belong to a journal's new config are in their place."""
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS).metadata.get(DIGEST) == journal["new"]
    return "pickle" in journal and (folder / PICKLE).is_file() and sum_of(folder / PICKLE) == journal["pickle"]


def belongs(config: str, metadata: Mapping[str, str]) -> bool:
    """Whether weights with these metadata were saved with the config of this digest; also where they do not say with which."""
    return metadata.get(DIGEST) in (None, config)


def check_pair(config: str, path: Path, metadata: Mapping[str, str], strict: bool = False) -> None:
    """Say so where weights belong to another config than the one beside them, of this digest; an error if `strict`."""
    if belongs(config, metadata):
        return
    message = (
        f"{path} is not the config that the weights beside it were saved with: the two are of different saves, or it was "
        "edited since. Its settings are used."
    )
    if strict:
        raise AdapterFileError(message)
    warn(MixedFilesWarning, message, stacklevel=5)


def check_sums(folder: Path, required: bool = False) -> None:
    """Compare an adapter's files with the SHA-256 sums beside them, where there are any, or they are `required`.

    Raises `AdapterFileError` where one differs.
    """
    path = folder / SUMS
    if not path.is_file():
        if required:
            raise AdapterFileError(f"{folder} has no {SUMS}, which was asked for; save with manifest=True to write it.")
        return
    for line in _read(path).decode("utf-8", "replace").splitlines():
        wanted, _, name = line.partition("  ")
        if name in (CONFIG, WEIGHTS, PICKLE) and (not (folder / name).is_file() or sum_of(folder / name) != wanted):
            raise AdapterFileError(f"{folder / name} is not the file whose SHA-256 stands in {path}; it was changed.")


def sum_of(path: Path) -> str:
    """The SHA-256 of a file."""
    made = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            made.update(block)
    return made.hexdigest()


@dataclass(frozen=True)
class Save:
    """One save of an adapter. write: makes the weights' temporary file beside the path that it is given, with metadata."""

    folder: Path
    config: bytes
    write: Write
    name: str = WEIGHTS
    manifest: bool = False

    def run(self) -> None:
        """Do it: all of it or nothing, one process at a time. Raises `AdapterFileError`, the old files as they were."""
        try:
            if self.folder.is_symlink() and not limits.FOLLOW_LINKS:
                raise AdapterFileError(f"{self.folder} is a link; give the folder itself.")
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                recover(self.folder)
                self._commit(*self._prepared())
        except OSError as error:
            raise AdapterFileError(
                f"the adapter could not be saved to {self.folder}: {error}. What was there is as it was."
            ) from error

    def _prepared(self) -> tuple[Path, Path]:
        """Both files, whole and on the disk, under other names."""
        weights = self.write(self.folder / self.name, {DIGEST: digest(self.config)})
        with dropped_on_error(weights):
            return weights, write_beside(self.folder / CONFIG, self.config)

    def _commit(self, weights: Path, config: Path) -> None:
        folder, journal = self.folder, self.folder / JOURNAL
        before = _read(folder / CONFIG) if (folder / CONFIG).is_file() else None
        try:
            sums = self._sums(weights) if self.manifest else b""
            if before is not None:
                held = {"new": digest(self.config), "old": before.decode("utf-8", "replace")}
                if self.name == PICKLE:  # which cannot say itself what it belongs to
                    held["pickle"] = sum_of(weights)
                write_atomically(journal, json.dumps(held).encode())
            if (folder / SUMS).is_file():
                os.unlink(folder / SUMS)
            settle(config, folder / CONFIG)
            settle(weights, folder / self.name)
            if self.name == PICKLE:
                (folder / WEIGHTS).unlink(missing_ok=True)  # it would be read instead
        except BaseException:
            self._take_back(weights, config, before)
            raise
        if sums:
            write_atomically(folder / SUMS, sums)
        journal.unlink(missing_ok=True)
        sync_folder(folder)

    def _take_back(self, weights: Path, config: Path, before: bytes | None) -> None:
        """After an error: the config that the weights which are still there belong to."""
        replaced = not config.exists() and weights.exists()
        with suppress(OSError):
            if replaced and before is not None:
                write_atomically(self.folder / CONFIG, before)
            elif replaced:
                (self.folder / CONFIG).unlink()
        for path in (weights, config):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _sums(self, weights: Path) -> bytes:
        return f"{sha256(self.config).hexdigest()}  {CONFIG}\n{sum_of(weights)}  {self.name}\n".encode()


def recover(folder: Path) -> None:
    """Clear up what killed saves left, in a locked folder: the config that the weights belong to, and temporary files."""
    config = folder / CONFIG
    if config.is_file() and (text := read_config(config)) != _read(config):
        write_atomically(config, text)
    for name in (CONFIG, WEIGHTS, PICKLE, SUMS, JOURNAL):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time save into a folder, where the system can lock it. The others wait."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
