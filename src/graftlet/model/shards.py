# SPDX-License-Identifier: Apache-2.0
"""Merging a model of any size on disk: shard by shard, in the memory of one shard and one adapter.

The model is made without memory. Each of its tensors is read from the base's files as its turn comes, merged where the
adapter stands on it, and written. What is written stays: an interrupted merge goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CONFIG_NAME, PeftConfig
from ..core import state
from ..core.host import AdapterHost, hosts
from ..core.layer import AdaptedLayer
from ..core.merging import exactly
from ..core.method import Method, Replace
from ..core.replace import Replacement
from ..core.ties import tied
from ..errors import AdapterFileError, MergeError, UnsupportedOptionError
from ..files import write_atomically
from ..registry import lookup
from . import save
from .peft_model import PeftModel

MANIFEST = "merging.json"
NAME = "default"


class Merge:
    """One merge on disk.

    Args:
        base: the folder of the base's files. adapter: the adapter's. out: where the merged model goes.
        skeleton: the base's class with its config, on meta (`skeleton_of`), in the dtype that is wanted.
        shard_size: of the largest file that is written, and so of the memory that is needed. device: where to compute.

    Raises:
        UnsupportedOptionError: it cannot be done tensor by tensor, with the reason; the model must be built then.
        AdapterFileError: the adapter does not fit.
    """

    def __init__(
        self, base: Path, adapter: str, out: Path, skeleton: Any, shard_size: int | str = "5GB", device: str = "cpu"
    ) -> None:
        self.base, self.adapter, self.out, self.skeleton = base, adapter, out, skeleton
        self.shard_size, self.device = shard_size, device
        self.config = PeftConfig.from_pretrained(adapter)
        self.files = base_files(base)
        self.state: dict[str, Tensor] = dict(skeleton.state_dict())
        self.dtypes = {k: t.dtype for k, t in self.state.items()}
        self.keys = {id(t): k for k, t in reversed(list(skeleton.named_parameters(remove_duplicate=False)))}
        self._check()
        self.tensors = save.load_peft_weights(adapter, device)
        state.check_finite(self.tensors, adapter)
        self.paths: dict[AdapterHost, str] = {}
        self.owners = self._owners()
        self._made: dict[str, Tensor] = {}

    def _check(self) -> None:
        shared = {f"{path}.{name}" for group in tied(self.skeleton) for path, name in group.places}
        if strange := [k for k in self.files if k not in self.state]:
            raise UnsupportedOptionError(f"the base's files have other tensors than the model, such as {strange[0]}")
        if lacking := [k for k in self.state if k not in self.files and k not in shared]:
            raise UnsupportedOptionError(f"the base's files lack {lacking[0]}")
        method = lookup(self.config.peft_type).method
        if not issubclass(method, (Method, Replace)) or self.config.bias != "none" or self.config.layer_replication:
            raise UnsupportedOptionError(f"{self.config.peft_type} of this kind changes more than the adapted layers")
        derived = issubclass(method, Method) and method().derived(self.config)
        if derived or self.config.trainable_token_indices:
            raise UnsupportedOptionError(f"a part of the {self.config.peft_type} adapter is not in its file")

    def _owners(self) -> dict[str, AdapterHost]:
        """The layers, by the key of each tensor that merging may change."""
        shared = {id(group.parameter) for group in tied(self.skeleton)}
        model = PeftModel(self.skeleton, self.config, NAME, low_cpu_mem_usage=True, _init=False)
        self.paths = {host: path for path, host in hosts(model)}
        given = state.unpacked(model, NAME, self.tensors)
        if complaints := state.fit(state.slots(model, NAME, self.config, given), given).complaints():
            raise AdapterFileError(f"{self.adapter} does not fit {self.base}: {'; '.join(complaints)}.")
        found: dict[str, AdapterHost] = {}
        for host in self.paths:
            if isinstance(host, AdaptedLayer):
                self._check_layer(host)
                held = [t for t in (host.site.weight, host.site.read_bias()) if t is not None]
            else:
                held = list(host.base.parameters())
            if any(id(t) in shared for t in held):
                raise UnsupportedOptionError("the adapter is on a weight that layers share")
            found.update({self.keys[id(t)]: host for t in held})
        return found

    def _check_layer(self, layer: AdaptedLayer) -> None:
        if why := layer.methods[NAME].unmergeable:
            raise MergeError(f"the adapter cannot be merged: {why}.")
        if layer.commons.get(NAME) or any(not spec.saved for spec in layer.specs[NAME].values()):
            raise UnsupportedOptionError(f"{self.config.peft_type} has tensors that are not a layer's own")

    # the work

    def run(
        self, report: Callable[[str], None] = lambda _: None, also: Callable[[Path], object] = lambda _: None
    ) -> None:
        """Do it, or what is left of it, and put the result into its place, in place of what is there.

        report: told of each file that is done. also: writes what else belongs into the folder.
        """
        part = self._claim()
        shards = self._shards()
        for number, (name, keys) in enumerate(shards.items(), 1):
            if not (part / name).is_file():
                save.save_tensors({k: self.merged(k) for k in keys}, part / name)
                report(f"{name}: {number} of {len(shards)}")
        if len(shards) > 1:
            self._index(part, shards)
        self._settings(part)
        also(part)
        (part / MANIFEST).unlink()
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(part, self.out)

    @property
    def part(self) -> Path:
        """Where the work is until it is finished."""
        return self.out.with_name(f".{self.out.name}.merging")

    def _claim(self) -> Path:
        """The folder of an interrupted merge of the same things, or a new one."""
        manifest = json.dumps(self._identity(), indent=1).encode()
        if (self.part / MANIFEST).is_file() and (self.part / MANIFEST).read_bytes() != manifest:
            shutil.rmtree(self.part)
        self.part.mkdir(parents=True, exist_ok=True)
        write_atomically(self.part / MANIFEST, manifest)
        return self.part

    def _identity(self) -> dict[str, Any]:
        weights = save.weights_file(self.adapter, None, allow_pickle=False)
        digest = hashlib.sha256(weights.read_bytes() + (weights.parent / CONFIG_NAME).read_bytes()).hexdigest()
        files = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(set(self.files.values()))}
        dtypes = sorted({str(d) for d in self.dtypes.values()})
        return {"adapter": digest, "base": files, "dtypes": dtypes, "shard_size": str(self.shard_size)}

    def _shards(self) -> dict[str, list[str]]:
        """The tensors of each file, as transformers splits a model that it has read; what is tied stands there once."""
        from huggingface_hub import split_state_dict_into_shards_factory

        again = {f"{path}.{name}" for group in tied(self.skeleton) for path, name in group.places[1:]}
        kept = sorted((k for k in self.state if k in self.files and k not in again), key=_natural)
        split = split_state_dict_into_shards_factory(
            {key: self.state[key] for key in kept},
            get_storage_size=lambda t: t.nbytes,
            get_storage_id=lambda t: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=self.shard_size,
        )
        return dict(split.filename_to_tensors)

    @torch.no_grad()
    def merged(self, key: str) -> Tensor:
        """One tensor of the merged model. Raises `MergeError` where it is not finite."""
        host = self.owners.get(key)
        if host is None:
            return self.read(key)
        if isinstance(host, Replacement):
            names = {self.keys[id(p)]: f"{self.paths[host]}.{n}" for n, p in self._copied(host)}
            return self.tensors[names[key]].to(self.dtypes[key])
        assert isinstance(host, AdaptedLayer)
        if key not in self._made:
            self._made = self._merged(host)
        return self._made.pop(key)

    def _copied(self, host: Replacement) -> Iterator[tuple[str, nn.Parameter]]:
        """The names in the adapter's file of what replaces a module's parameters."""
        return ((n, p) for n, p in zip(host.state(NAME), host.base.parameters(), strict=False))

    def _merged(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        site = layer.site
        keys = [self.keys[id(site.weight)], *([self.keys[id(b)]] if (b := site.read_bias()) is not None else [])]
        with self._filled(layer), exactly(site.device):
            W, b = layer.merged_weight([NAME])
            site.accepts(W)
            found = dict(zip(keys, [site.kept(W), b], strict=False))
        if b is not None and len(keys) < 2:
            raise MergeError(f"the adapter changes the bias of {self.paths[layer]}, which has none.")
        if bad := [k for k, t in found.items() if t is not None and not t.isfinite().all()]:
            raise MergeError(f"merging would write NaN or Inf into {bad[0]}; nothing was put into {self.out}.")
        return {k: t.to("cpu", self.dtypes[k]).contiguous() for k, t in found.items() if t is not None}

    def read(self, key: str) -> Tensor:
        """One tensor of the base, as the model has it in memory."""
        from safetensors import safe_open

        with safe_open(self.files[key], "pt", device=self.device) as file:
            return file.get_tensor(key).to(self.dtypes[key])

    @contextmanager
    def _filled(self, layer: AdaptedLayer) -> Iterator[None]:
        """Let a layer have its tensors and its adapter's for a while."""
        site, module, path = layer.site, layer.site.module._parameters, self.paths[layer]
        empty = {
            n: p for n, p in module.items() if p is not None and id(p) in self.keys and n in (site.name, site.bias)
        }
        before = {n: layer.tensor(NAME, n) for n in layer.specs[NAME]}
        own = {k[len(path) + 1 :]: t for k, t in self.tensors.items() if k.startswith(f"{path}.")}
        try:
            module.update({n: nn.Parameter(self.read(self.keys[id(p)]), False) for n, p in empty.items()})
            for key, tensor in layer.unpack(NAME, own).items():
                if key in layer.state(NAME):
                    layer.assign(NAME, key, tensor)
            yield
        finally:
            module.update(empty)
            for name, tensor in before.items():
                layer.put(NAME, name, tensor, layer.specs[NAME][name])

    def _index(self, part: Path, shards: dict[str, list[str]]) -> None:
        tensors = {k: self.state[k] for keys in shards.values() for k in keys}
        total = {"total_parameters": sum(t.numel() for t in tensors.values())}
        index = {
            "metadata": {**total, "total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {key: name for name, keys in shards.items() for key in keys},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_atomically(part / "model.safetensors.index.json", text.encode())

    def _settings(self, part: Path) -> None:
        config = self.skeleton.config
        config.architectures, config.dtype = [type(self.skeleton).__name__], self.skeleton.dtype
        config.save_pretrained(part)
        if self.skeleton.can_generate():
            self.skeleton.generation_config.save_pretrained(part)


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def skeleton_of(base: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model that a folder holds, on meta: no memory, and nothing read but its settings."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config: Any = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or getattr(config, "dtype", None))
    if (base / "generation_config.json").is_file():
        made.generation_config = GenerationConfig.from_pretrained(base)
    return made


def base_files(base: Path) -> dict[str, Path]:
    """Where each tensor of a saved model is. Raises `UnsupportedOptionError` where it has no safetensors files."""
    from safetensors import safe_open

    index, single = base / "model.safetensors.index.json", base / "model.safetensors"
    if index.is_file():
        return {key: base / name for key, name in json.loads(index.read_text())["weight_map"].items()}
    if not single.is_file():
        raise UnsupportedOptionError(f"{base} holds no safetensors files")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)
