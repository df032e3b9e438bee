# SPDX-License-Identifier: Apache-2.0
"""Adapter files: the tensors of an adapter out of a model and into one.

A load looks at the file's header first: keys, kinds and shapes are compared with the model before any tensor is made.
"""

from __future__ import annotations

import io
import json
import os
from collections import namedtuple
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import errors, limits, pair
from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Targets
from ..core import state
from ..core.host import check_known, standing
from ..core.lifecycle import adapters_of, relink
from ..errors import AdapterFileError, AdapterNameError, KeysWarning, shown, warn
from ..files import TensorFile, dropped_on_error, find_file, read_pickle, settle, write_beside, write_tensors
from ..weights.whole import in_parts, made_whole
from . import embeddings, fused, prompting
from .parts import configs_of, root_of

SAFETENSORS_WEIGHTS_NAME = pair.WEIGHTS
WEIGHTS_NAME = pair.PICKLE

VOCABULARY = "vocab_size"
"""In a file's metadata: how many tokens the base had."""

LoadResult = namedtuple("LoadResult", ["missing_keys", "unexpected_keys"])


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by their key in the file.

    Args:
        state_dict: take the values from here, by the model's own keys (a gathered state of a sharded model). Without, what
            an engine keeps in parts is gathered, of the adapter alone: all processes have to call this.
        unwrap_compiled: kept for callers of the reference; compiled models are always seen through.
        save_embedding_layers: the base's embeddings too; "auto" where they were targeted or the vocabulary was resized.

    Raises:
        AdapterNameError: no such adapter.
    """
    model = root_of(model)
    config = configs_of(model).get(adapter_name)
    if config is None or not config.is_prompt_learning:
        check_known([adapter_name], adapters_of(model))
    prompt = config is not None and config.is_prompt_learning
    beside = {} if prompt else embeddings.to_save(model, config, save_embedding_layers)
    ids = _tensors_of(model, adapter_name, config) | {id(tensor) for tensor in beside.values()}
    with made_whole(model, ids, state_dict) as known:
        found = prompting.collect(model, adapter_name) if prompt else state.collect(model, adapter_name, config)
        found.update({key: known.get(id(tensor), tensor) for key, tensor in beside.items()})
        return {key: tensor.detach() for key, tensor in found.items()}


def _tensors_of(model: nn.Module, adapter: str, config: PeftConfig | None) -> set[int]:
    """The ids of all tensors of an adapter: those that its file has, and those that they are made of."""
    held = [slot.tensor for slot in state.slots(model, adapter, config).values()]
    held += [p for host in standing(model)[0] for p in host.trainable(adapter).values()]
    if config is not None and config.is_prompt_learning:
        held += prompting.tensors(model, adapter)
    return {id(tensor) for tensor in held}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put tensors into an adapter that the model has, as far as they belong to it.

    Returns `(missing_keys, unexpected_keys)`: what the adapter has and the dictionary has not, and the other way round.

    Raises:
        AdapterFileError: a tensor has another shape or kind (unless `ignore_mismatched_sizes`); nothing was changed.
        AdapterNameError: no such adapter.
    """
    model = root_of(model)
    config = configs_of(model).get(adapter_name)
    if config is not None and config.is_prompt_learning:
        with made_whole(model, _tensors_of(model, adapter_name, config), changed=True):
            return LoadResult(*prompting.load(model, adapter_name, peft_model_state_dict, ignore_mismatched_sizes))
    check_known([adapter_name], adapters_of(model))
    return Places.of(model, adapter_name, peft_model_state_dict).fill(peft_model_state_dict, ignore_mismatched_sizes)


@dataclass(frozen=True)
class Places:
    """Where an adapter's tensors belong in a model, found once for a load.

    there: the wrappers that it is on. wanted: all that its file holds, by key. beside: the base's embeddings, by key.
    """

    model: nn.Module
    adapter: str
    there: state.Placed
    wanted: dict[str, state.Slot]
    beside: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, adapter: str, given: Mapping[str, Tensor]) -> Places:
        """The places for a file's tensors."""
        there = state.placed(model, adapter)
        wanted = state.slots(model, adapter, configs_of(model).get(adapter), given, there)
        return cls(model, adapter, there, wanted, embeddings.embedding_weights(model))

    def read(self, given: Mapping[str, Tensor]) -> tuple[dict[str, state.Slot], dict[str, Tensor]]:
        """The slots that a file's tensors should fill, and these as the layers hold them."""
        plain = embeddings.without_levels(given, self.wanted, self.adapter)
        held = state.unpacked(self.there, self.adapter, plain)
        return {**self.wanted, **embeddings.slots(self.beside, held)}, held

    def fit(self, given: Mapping[str, Tensor]) -> state.Fit:
        """How a file's tensors (real, or on meta) fit."""
        return state.fit(*self.read(given))

    def fill(self, given: Mapping[str, Tensor], ignore_mismatched_sizes: bool = False) -> LoadResult:
        """Put a file's tensors into their places. Raises `AdapterFileError`, nothing changed, where they do not fit."""
        wanted, held = self.read(given)
        report = state.fit(wanted, held)
        wrong = [w.split(" ")[0] for w in report.misshaped]
        if (report.misshaped or report.mistyped) and not ignore_mismatched_sizes:
            raise AdapterFileError(
                f"tensors for adapter {self.adapter!r} do not fit: {'; '.join(report.complaints())}."
            )
        with self._whole([slot.tensor for slot in wanted.values()]) as known:
            slots = {key: replace(slot, tensor=known.get(id(slot.tensor), slot.tensor)) for key, slot in wanted.items()}
            state.fill({key: slot for key, slot in slots.items() if key not in wrong}, held, self.adapter)
        return LoadResult(report.missing, report.unexpected)

    def _whole(self, tensors: list[Tensor]) -> AbstractContextManager[Mapping[int, Tensor]]:
        """A block in which these tensors, and those that they are made of, are whole."""
        tensors = [*tensors, *(p for host in standing(self.model)[0] for p in host.trainable(self.adapter).values())]
        if not any(map(in_parts, tensors)):
            return nullcontext({})
        return made_whole(self.model, {id(tensor) for tensor in tensors}, changed=True)


def load_verified(model: nn.Module, given: Stored, adapter: str, strict: bool | None, origin: str) -> Any:
    """Fill an adapter that was just injected, after comparing all that the file has with all that the model needs.

    strict (None: `limits.STRICT_LOADS`): whatever is missing, unexpected, misshaped, mistyped or not finite raises
    `AdapterFileError`; otherwise all of it is named in a `KeysWarning`, and what fits is loaded.
    """
    model = root_of(model)
    strict = limits.STRICT_LOADS if strict is None else strict
    prompt, shapes = configs_of(model)[adapter].is_prompt_learning, given.shapes()
    places = None if prompt else Places.of(model, adapter, shapes)
    report = prompting.misfit(model, adapter, shapes) if places is None else places.fit(shapes)
    complaints = report.complaints()
    if complaints and (strict or report.misshaped or report.mistyped):
        hint = embeddings.vocabulary_hint(report.misshaped)
        raise AdapterFileError(
            f"{origin} does not fit this model: {'; '.join(complaints)}.{hint} "
            "The adapter was made for another base or another config"
            + ("." if report.misshaped or report.mistyped else "; strict=False loads what fits.")
        )
    tensors = given.read()
    if strict:
        state.check_finite(tensors, origin)
    else:
        complaints += state.unfinite(tensors)
    if complaints:
        warn(KeysWarning, f"{origin}: {'; '.join(complaints)}.", stacklevel=5)
    result = set_peft_model_state_dict(model, tensors, adapter) if places is None else places.fill(tensors)
    relink(model, adapter)
    _fill_missing(model, adapter, report.missing)
    state.check_loaded(model, adapter, origin)
    return result


def check_same_config(held: PeftConfig, given: PeftConfig, adapter: str, origin: str) -> None:
    """Raise `AdapterNameError` where a file's config means another adapter than the one that is there."""
    ours, theirs = (json.loads(config.to_json()) for config in (held, given))
    apart = [name for name in ours if name not in NOT_COMPARED and ours[name] != theirs.get(name)]
    if apart:
        name = apart[0]
        raise AdapterNameError(
            f"adapter {adapter!r} exists already, with another config than {origin}: {name}={shown(ours[name], 60)}, and "
            f"{shown(theirs.get(name), 60)} in the file; delete it first, choose another name, or hotswap."
        )


NOT_COMPARED = {f.name for kind in (PeftConfig, Targets, Excludes, Layers, FanInFanOut) for f in fields(kind)}
"""What may differ between an adapter and a checkpoint of it: which layers it is on is told by the tensors."""


@torch.no_grad()
def _fill_missing(model: nn.Module, adapter: str, missing: list[str]) -> None:
    """A tensor that the file lacks must not stay without memory: it starts at zero, so it is the same every time."""
    wanted = state.slots(model, adapter, configs_of(model)[adapter]) if missing else {}
    for key in missing:
        slot = wanted.get(key)
        if slot is not None and slot.host is not None and slot.tensor.is_meta:
            slot.host.assign(adapter, slot.key, torch.zeros(slot.tensor.shape))


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter: of a directory, or of a repository on the hub.

    Args:
        device: where to put them; the CPU unless given.
        key_mapping: regexes and what to put in their place in every key, for files that were made under other names.
        allow_pickle: read an `adapter_model.bin` where there is no safetensors file (with `weights_only`).

    Raises:
        AdapterFileError: there is no such file, it is damaged, or it is a pickle and those are not allowed.
    """
    return stored(model_id, device, key_mapping, subfolder, allow_pickle, **hub).read()


@dataclass(frozen=True)
class Stored:
    """The tensors of a saved adapter, before they are read: their file was opened, and its header checked."""

    path: Path
    file: TensorFile | None
    pickled: dict[str, Tensor]
    device: str
    key_mapping: dict[str, str] | None

    @property
    def metadata(self) -> Mapping[str, str]:
        return {} if self.file is None else self.file.metadata

    def shapes(self) -> dict[str, Tensor]:
        """Kinds and shapes: tensors on meta, of a pickle those that there are."""
        return rename(self.pickled if self.file is None else self.file.on_meta(), self.key_mapping)

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the device asked for."""
        return rename(self.pickled if self.file is None else self.file.read(self.device), self.key_mapping)


def stored(
    source: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    **hub: Any,
) -> Stored:
    """Open a saved adapter's tensors. Arguments and errors are those of `load_peft_weights`."""
    path = weights_file(source, subfolder, allow_pickle, **hub)
    where = device or "cpu"
    if path.suffix == ".safetensors":
        return Stored(path, TensorFile(path), {}, where, key_mapping)
    return Stored(path, None, read_pickle(path, where), where, key_mapping)


def unfused(given: Stored, model: nn.Module, config: PeftConfig, origin: str) -> Stored:
    """A file as it is for the model: adapters on single experts put on the stacks that the model has of them.

    Raises `AdapterFileError` where that cannot be done.
    """
    if not fused.concerns(config, given.shapes()):
        return given
    return replace(given, file=None, pickled=fused.converted(model, config, given.read(), origin), key_mapping=None)


@dataclass(frozen=True)
class Checks:
    """What is checked of a saved adapter beside its tensors. base: the model's fingerprint must be the one saved.

    manifest: there must be SHA-256 sums beside the files; where there are any, they are always compared.
    """

    base: bool = False
    manifest: bool = False

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Checks:
        """Those asked for in a load's arguments, which are taken out."""
        return cls(bool(arguments.pop("verify_base", False)), bool(arguments.pop("manifest", False)))


TRIES = 20
"""So often an adapter is read again while others save it."""


def opened(
    source: str | os.PathLike[str], config: PeftConfig | None, checks: Checks, **arguments: Any
) -> tuple[PeftConfig, Stored]:
    """A saved adapter's config (unless one is given) and tensors, of one save.

    Raises `AdapterFileError` where they cannot be read, or are not what their sums say; warns where they are of two saves.
    """
    hub = {k: v for k, v in arguments.items() if k not in ("device", "key_mapping", "allow_pickle")}
    given = PeftConfig.from_pretrained(source, **hub) if config is None else config
    held = stored(source, **arguments)
    path = held.path.with_name(pair.CONFIG)
    if config is None and path.is_file():
        for _ in range(TRIES):  # a save may have come between reading the one and the other
            if pair.belongs(given.digest, held.metadata):
                break
            given, held = PeftConfig.from_pretrained(source, **hub), stored(source, **arguments)
        pair.check_pair(given.digest, path, held.metadata, errors.strict())
    pair.check_sums(held.path.parent, checks.manifest)
    return given, held


def weights_file(source: str | os.PathLike[str], subfolder: str | None, allow_pickle: bool, **hub: Any) -> Path:
    """Where an adapter's tensors are."""
    try:
        return find_file(source, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    except AdapterFileError as error:
        try:
            found = find_file(source, WEIGHTS_NAME, subfolder=subfolder, **hub)
        except AdapterFileError:
            raise error from None
        if not allow_pickle:
            raise AdapterFileError(
                f"{found} is a pickle, which can run code as it is read. If you trust its origin, load it with "
                "allow_pickle=True, and save it again as safetensors."
            ) from None
        return found


def rename(tensors: dict[str, Tensor], key_mapping: dict[str, str] | None) -> dict[str, Tensor]:
    """Keys with the first matching pattern of a mapping replaced. Raises `AdapterFileError` where two become one."""
    if not key_mapping:
        return tensors
    import re

    def renamed(key: str) -> str:
        for pattern, target in key_mapping.items():
            new, count = re.subn(pattern.lstrip("^"), target, key, count=1)
            if count:
                return new
        return key

    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if renamed(key) in found:
            raise AdapterFileError(f"key_mapping gives two tensors of the file the key {renamed(key)!r}.")
        found[renamed(key)] = tensor
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; tensors that share memory are written apart."""
    temporary = write_tensors(tensors, path, {"format": "pt", **(metadata or {})})
    with dropped_on_error(temporary):
        settle(temporary, path)


def save_adapter(
    folder: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, str] | None = None,
    safe: bool = True,
    manifest: bool = False,
) -> None:
    """Write an adapter's config and tensors in one transaction: whatever happens, the old pair is there or the new one.

    facts: go into the metadata. safe: as safetensors; otherwise as a pickle, and a safetensors file that would hide it is
    removed. manifest: SHA-256 sums too. Raises `AdapterFileError`, the old files as they were.
    """

    def write(path: Path, digest: Mapping[str, str]) -> Path:
        if safe:
            return write_tensors(tensors, path, {"format": "pt", **(facts or {}), **digest})
        content = io.BytesIO()
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, content)
        return write_beside(path, content.getvalue())

    text = (config.to_json() + "\n").encode()
    pair.Save(folder, text, write, pair.WEIGHTS if safe else pair.PICKLE, manifest).run()


def saved_config(config: PeftConfig) -> PeftConfig:
    """The config as it goes to the file: for inference, as every reader expects."""
    import copy

    shown = copy.copy(config)
    shown.inference_mode = True
    return shown
