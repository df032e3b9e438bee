# SPDX-License-Identifier: Apache-2.0
"""Adapter files: the tensors of an adapter out of a model and into one.

A load looks at the file's header first: keys, kinds and shapes are compared with the model before any tensor is made.
"""

from __future__ import annotations

import json
import os
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import state
from ..core.host import check_known
from ..core.layer import relink
from ..core.lifecycle import adapters_of
from ..errors import AdapterFileError, KeysWarning, warn
from ..files import find_file, read_tensors, settle
from . import embeddings, prompting
from .parts import configs_of, root_of

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

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
        state_dict: take the values from here, by the model's own keys (a gathered state of a sharded model).
        unwrap_compiled: kept for callers of the reference; compiled models are always seen through.
        save_embedding_layers: the base's embeddings too; "auto" where they were targeted or the vocabulary was resized.

    Raises:
        AdapterNameError: no such adapter.
    """
    model = root_of(model)
    config = configs_of(model).get(adapter_name)
    if config is not None and config.is_prompt_learning:
        found = prompting.collect(model, adapter_name)
    else:
        check_known([adapter_name], adapters_of(model))
        found = state.collect(model, adapter_name, config)
        found.update(embeddings.to_save(model, config, save_embedding_layers))
    if state_dict is not None:
        found = _values_from(model, found, state_dict)
    return {key: tensor.detach() for key, tensor in found.items()}


def _values_from(model: nn.Module, found: dict[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given values of the tensors that `found` names by identity."""
    clean = {name.replace("_orig_mod.", ""): tensor for name, tensor in given.items()}
    names = {id(t): n.replace("_orig_mod.", "") for n, t in _named_tensors(model)}
    return {key: clean.get(names.get(id(tensor), ""), tensor) for key, tensor in found.items()}


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


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
        return LoadResult(*prompting.load(model, adapter_name, peft_model_state_dict, ignore_mismatched_sizes))
    check_known([adapter_name], adapters_of(model))
    wanted = state.slots(model, adapter_name, config, peft_model_state_dict)
    given = state.unpacked(model, adapter_name, embeddings.without_levels(peft_model_state_dict, wanted, adapter_name))
    wanted.update(embeddings.slots(model, given))
    report = state.fit(wanted, given)
    wrong = [w.split(" ")[0] for w in report.misshaped]
    if (report.misshaped or report.mistyped) and not ignore_mismatched_sizes:
        raise AdapterFileError(f"tensors for adapter {adapter_name!r} do not fit: {'; '.join(report.complaints())}.")
    state.fill({k: s for k, s in wanted.items() if k not in wrong}, given, adapter_name)
    return LoadResult(report.missing, report.unexpected)


def load_verified(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str, strict: bool, origin: str) -> Any:
    """Fill an adapter that was just injected, after comparing all that the file has with all that the model needs.

    strict: whatever is missing, unexpected, misshaped, mistyped or not finite raises `AdapterFileError`; otherwise
    missing and unexpected tensors are named in a `KeysWarning`.
    """
    model, read = root_of(model), tensors
    config = configs_of(model)[adapter]
    if config.is_prompt_learning:
        report = prompting.misfit(model, adapter, tensors)
    else:
        wanted = state.slots(model, adapter, config, tensors)
        tensors = state.unpacked(model, adapter, embeddings.without_levels(tensors, wanted, adapter))
        report = state.fit({**wanted, **embeddings.slots(model, tensors)}, tensors)
    complaints = report.complaints()
    if complaints and (strict or report.misshaped or report.mistyped):
        hint = embeddings.vocabulary_hint(report.misshaped)
        raise AdapterFileError(
            f"{origin} does not fit this model: {'; '.join(complaints)}.{hint} "
            "The adapter was made for another base or another config"
            + ("." if report.misshaped or report.mistyped else "; strict=False loads what fits.")
        )
    if complaints:
        warn(KeysWarning, f"{origin}: {'; '.join(complaints)}.", stacklevel=5)
    if strict:
        state.check_finite(read, origin)
    result = set_peft_model_state_dict(model, tensors, adapter)
    relink(model, adapter)
    _fill_missing(model, adapter, report.missing)
    return result


@torch.no_grad()
def _fill_missing(model: nn.Module, adapter: str, missing: list[str]) -> None:
    """A tensor that the file lacks must not stay without memory: it starts at zero, so it is the same every time."""
    wanted = state.slots(model, adapter, configs_of(model)[adapter])
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
    return rename(read_tensors(weights_file(model_id, subfolder, allow_pickle, **hub), device or "cpu"), key_mapping)


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
    """Keys with the first matching pattern of a mapping replaced."""
    if not key_mapping:
        return tensors
    import re

    def renamed(key: str) -> str:
        for pattern, target in key_mapping.items():
            new, count = re.subn(pattern.lstrip("^"), target, key, count=1)
            if count:
                return new
        return key

    return {renamed(k): t for k, t in tensors.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    ready = {}
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(memory)
        ready[key] = tensor
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        with temporary.open("rb+") as file:
            _order(file)
            file.flush()
            os.fsync(file.fileno())
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _order(file: BinaryIO) -> None:
    """Sort a safetensors file's metadata, which comes out of a hash map: the same adapter gives the same bytes."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    file.seek(8)
    file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


def recorded(source: str | os.PathLike[str], fact: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """A fact that stands in the metadata of an adapter's file; None where it does not, or the file has none."""
    from safetensors import safe_open

    hub.pop("allow_pickle", None)
    path = weights_file(source, subfolder, allow_pickle=True, **hub)
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(fact)


def header_of(source: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors on meta: kinds and shapes, without reading any."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, "pt") as file:
            views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
            return {
                k: torch.empty(v.get_shape(), dtype=_DTYPES.get(v.get_dtype(), torch.float32), device="meta")
                for k, v in views.items()
            }
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{source} cannot be read: {error}. It is damaged or not an adapter file.") from error


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def saved_config(config: PeftConfig) -> PeftConfig:
    """The config as it goes to the file: for inference, as every reader expects."""
    import copy

    shown = copy.copy(config)
    shown.inference_mode = True
    return shown
