# SPDX-License-Identifier: Apache-2.0
"""A base model in its files: it stands here without memory, and each of its tensors is read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.ties import Group, tied
from ..errors import UnsupportedOptionError
from ..weights.unread import Unread
from .auto import base_class_of

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
"""What is needed of a base that is on the hub."""


class BaseFiles:
    """The tensors of a saved model, by the places that they have in its class.

    Args:
        folder: the model's. device: where its tensors are read to.
        skeleton: the model on meta (`skeleton_of`). Its parameters are exchanged for ones that can be read.

    Attributes:
        lacking: what the model has and the files do not. paths: the files.

    Raises:
        UnsupportedOptionError: the files cannot be read tensor by tensor, or are not the model's.
    """

    def __init__(self, folder: Path, skeleton: Any, device: str) -> None:
        if getattr(skeleton.config, "quantization_config", None) is not None:
            raise UnsupportedOptionError(f"{folder} is quantised, and its files hold packed numbers")
        self.device, self.places = device, located(folder)
        self.paths = sorted(set(self.places.values()))
        state = skeleton.state_dict(keep_vars=True)
        self.names = named(skeleton, state, self.places)
        self.lacking = [key for key in state if key not in self.names]
        self._check_shapes(state)
        self._check_ties(skeleton)
        self._buffers: dict[int, Callable[[], Tensor]] = {}
        self._hold(skeleton, state)

    def read(self, tensor: Tensor) -> Tensor:
        """The numbers of one of the skeleton's tensors, in the dtype that it has there."""
        return tensor.find() if isinstance(tensor, Unread) else self._buffers[id(tensor)]()

    def _hold(self, skeleton: Any, state: Mapping[str, Tensor]) -> None:
        unread: dict[int, Unread] = {}
        for key, tensor in state.items():
            find = partial(self._found, key, tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                unread.setdefault(id(tensor), Unread.of(tensor, find))
            else:
                self._buffers[id(tensor)] = find
        for module in skeleton.modules():
            module._parameters.update({n: unread[id(p)] for n, p in module._parameters.items() if p is not None})

    def _found(self, key: str, dtype: torch.dtype) -> Tensor:
        return self._tensor(self.names[key]).to(dtype)

    def _tensor(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.places[name], "pt", device=self.device) as file:
            return file.get_tensor(name)

    def _check_shapes(self, state: Mapping[str, Tensor]) -> None:
        from safetensors import safe_open

        keys: dict[str, list[str]] = {}
        for key, name in self.names.items():
            keys.setdefault(name, []).append(key)
        for path in self.paths:
            with safe_open(path, "pt") as file:
                for name in [n for n in file.keys() if self.places.get(n) == path]:  # noqa: SIM118  it is no dictionary
                    shape = tuple(file.get_slice(name).get_shape())
                    if wrong := [k for k in keys.get(name, ()) if tuple(state[k].shape) != shape]:
                        what = f"{name} in {path.name} is {shape}, and {wrong[0]} of the model {tuple(state[wrong[0]].shape)}"
                        raise UnsupportedOptionError(what)

    def _check_ties(self, skeleton: Any) -> None:
        """Raise where the files hold two tensors that the model has as one: it depends on transformers what becomes of them."""
        for keys in keys_of(tied(skeleton)):
            stored = [key for key in keys if key in self.places]
            held = [self._tensor(key) for key in stored] if len(stored) > 1 else []
            if any(not tensor.equal(held[0]) for tensor in held):
                raise UnsupportedOptionError(f"{' and '.join(stored)} are one tensor, but differ in the files")


def named(skeleton: Any, state: Iterable[str], stored: Mapping[str, Path]) -> dict[str, str]:
    """What each tensor of a model is called in its files: a tied one stands there once, and the levels of a head may lack."""
    prefix = f"{skeleton.base_model_prefix}."
    groups = {key: keys for keys in keys_of(tied(skeleton)) for key in keys}
    found: dict[str, str] = {}
    for key in state:
        alike = [key, *groups.get(key, ())]
        names = [n for k in alike for n in (k, k.removeprefix(prefix)) if n in stored]
        found.update({key: names[0]} if names else {})
    return found


def keys_of(groups: Iterable[Group]) -> list[list[str]]:
    """The keys of parameters that are one."""
    return [[f"{path}.{name}" for path, name in group.places] for group in groups]


def located(folder: Path) -> dict[str, Path]:
    """Where each tensor of a saved model is. Raises `UnsupportedOptionError` where it has no safetensors files."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        found = {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        if gone := sorted({path.name for path in found.values() if not path.is_file()}):
            raise UnsupportedOptionError(f"{folder} lacks {gone[0]}")
        return found
    if not single.is_file():
        raise UnsupportedOptionError(f"{folder} holds no safetensors files")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def skeleton_of(
    base: Path, dtype: torch.dtype | None = None, task: str = "CAUSAL_LM", head: dict[str, Any] | None = None
) -> Any:
    """The model that a folder holds, on meta: no memory, and nothing read but its settings.

    task: an adapter's task type, which says the model's class. head: what that is to be told beside, such as `num_labels`.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(base, **(head or {}))
    with torch.device("meta"):
        kind = getattr(transformers, base_class_of(task))
        made: Any = kind.from_config(config, dtype=dtype or getattr(config, "dtype", None))
    if (base / "generation_config.json").is_file():
        made.generation_config = transformers.GenerationConfig.from_pretrained(base)
    return made


def fetched(name: str, revision: str | None = None) -> Path:
    """The folder of a base on the hub, downloaded where it is not in the cache.

    Raises `UnsupportedOptionError` where its files cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UnsupportedOptionError(f"the files of {name} cannot be had: {error}") from error
