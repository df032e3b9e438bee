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
from contextlib import ExitStack, contextmanager
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
from ..core.tensors import Common, as_held, attribute
from ..core.ties import tied
from ..errors import AdapterFileError, MergeError, UnsupportedOptionError
from ..files import write_atomically
from ..registry import lookup
from . import embeddings, save
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
        self.names: dict[
            str, str
        ] = {}  # what a tensor is called in the files, where they have it once for several places
        self.state: dict[str, Tensor] = dict(skeleton.state_dict())
        self.dtypes = {k: t.dtype for k, t in self.state.items()}
        self.parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        self.brought: dict[str, Tensor] = {}  # embeddings that stand whole in the adapter's file
        self.modules = {id(module): path for path, module in skeleton.named_modules()}
        self.tied = [[f"{path}.{name}" for path, name in group.places] for group in tied(skeleton)]
        self._check()
        self.tensors = save.load_peft_weights(adapter, device)
        state.check_finite(self.tensors, adapter)
        self.paths: dict[AdapterHost, str] = {}
        self.owners = self._owners()
        self._made: dict[str, Tensor] = {}
        self.parted = [keys for keys in self.tied if not self._alike(keys)]

    def _check(self) -> None:
        for keys in self.tied:  # one of them stands in the files
            held = [k for k in keys if k in self.files]
            self.files.update({k: self.files[held[0]] for k in keys if held})
            self.names.update({k: held[0] for k in keys if held and k not in held})
        if strange := [k for k in self.files if k not in self.state]:
            raise UnsupportedOptionError(f"the base's files have other tensors than the model, such as {strange[0]}")
        if lacking := [k for k in self.state if k not in self.files]:
            raise UnsupportedOptionError(f"the base's files lack {lacking[0]}")
        paths = dict(self.skeleton.named_modules(remove_duplicate=False))
        if len(paths) > len(self.modules):
            raise UnsupportedOptionError("the model uses a module in several places")
        method = lookup(self.config.peft_type).method
        if not issubclass(method, (Method, Replace)) or self.config.bias != "none" or self.config.layer_replication:
            raise UnsupportedOptionError(f"{self.config.peft_type} of this kind changes more than the adapted layers")
        if self.config.trainable_token_indices:
            raise UnsupportedOptionError(f"the {self.config.peft_type} adapter replaces tokens, which layers share")

    def _owners(self) -> dict[str, AdapterHost]:
        """The layers, by the key of each tensor that merging may change."""
        try:
            model = PeftModel(self.skeleton, self.config, NAME, low_cpu_mem_usage=True, _init=False)
        except NotImplementedError as error:  # what torch raises for a tensor on meta
            raise UnsupportedOptionError(f"{self.config.peft_type} looks at the weights as it is put in") from error
        self.paths = {host: path for path, host in hosts(model)}
        wanted = state.slots(model, NAME, self.config, self.tensors)
        self.tensors = embeddings.without_levels(self.tensors, wanted, NAME)
        given = state.unpacked(model, NAME, self.tensors)
        whole = embeddings.slots(model, given)
        if complaints := state.fit({**wanted, **whole}, given).complaints():
            raise AdapterFileError(f"{self.adapter} does not fit {self.base}: {'; '.join(complaints)}.")
        self._share(model, {k: slot for k, slot in wanted.items() if isinstance(slot.host, Common)}, given)
        brought = {id(slot.tensor): given[key] for key, slot in whole.items()}
        self.brought = {key: brought[id(p)] for key, p in self.parameters.items() if id(p) in brought}
        found: dict[str, AdapterHost] = {}
        for host in self.paths:
            if isinstance(host, AdaptedLayer):
                self._check_layer(host)
                names = [host.site.name, *([host.site.bias] if host.site.has_bias and host.site.bias else [])]
                found.update({self._key(host.site.module, name): host for name in names})
            else:
                found.update({self._key(host.base, name): host for name, _ in host.base.named_parameters()})
        return found

    def _share(self, model: PeftModel, wanted: dict[str, Any], given: dict[str, Tensor]) -> None:
        """What all layers of the adapter share is made once, and stays."""
        tuner = model.tuner
        if tuner is not None and tuner.pending is not None and tuner.pending[0].commons:
            tuner.pending[0].share_on(self.device)
            state.fill(wanted, given, NAME)

    def _key(self, module: nn.Module, name: str) -> str:
        """The key in the model of a tensor of one of its modules."""
        path = self.modules[id(module)]
        return f"{path}.{name}" if path else name

    def _check_layer(self, layer: AdaptedLayer) -> None:
        method = layer.methods[NAME]
        if why := method.unmergeable:
            raise MergeError(f"the adapter cannot be merged: {why}.")
        derived = method.derived(self.config)
        if derived and (layer.commons.get(NAME) or method.follows_ties):
            raise UnsupportedOptionError(f"{self.config.peft_type} makes tensors of all layers' weights together")
        if not derived and any(not spec.saved for spec in layer.specs[NAME].values()):
            raise UnsupportedOptionError(f"{self.config.peft_type} has tensors that are made of all layers together")

    def _alike(self, keys: list[str]) -> bool:
        """Whether places that share a tensor still do after merging."""
        if not any(key in self.owners for key in keys):
            return True
        first, *rest = [self._result(key) for key in keys]
        return all(t.equal(first) for t in rest)

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

        again = {key for keys in self.tied if keys not in self.parted for key in keys[1:]}
        kept = sorted((k for k in self.state if k not in again), key=_natural)
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
        if key not in self._made and isinstance(layer := self.owners.get(key), AdaptedLayer):
            self._made = self._merged(layer)  # a weight, and the bias that comes after it
        return self._made.pop(key) if key in self._made else self._result(key)

    @torch.no_grad()
    def _result(self, key: str) -> Tensor:
        host = self.owners.get(key)
        if host is None:
            return self.read(key)
        if isinstance(host, AdaptedLayer):
            return self._merged(host)[key]
        names = zip(host.state(NAME), host.base.named_parameters(), strict=False)
        copies = {self._key(host.base, name): f"{self.paths[host]}.{own}" for own, (name, _) in names}
        return self.tensors[copies[key]].to(self.dtypes[key])

    def _merged(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        site, leaders = layer.site, layer.leaders(NAME)
        names = [site.name, *([site.bias] if site.has_bias and site.bias else [])]
        keys = [self._key(site.module, name) for name in names]
        with ExitStack() as filled, exactly(torch.device(self.device)):
            filled.enter_context(self._filled(layer, adapter=not leaders))
            for leader in leaders:
                filled.enter_context(self._filled(leader))
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

        if key in self.brought:
            return self.brought[key].to(self.dtypes[key], copy=True)
        with safe_open(self.files[key], "pt", device=self.device) as file:
            return file.get_tensor(self.names.get(key, key)).to(self.dtypes[key])

    @contextmanager
    def _filled(self, layer: AdaptedLayer, adapter: bool = True) -> Iterator[None]:
        """Let a layer have its tensors, and its adapter's, for a while."""
        site, module = layer.site, layer.site.module._parameters
        empty = {n: p for n, p in module.items() if p is not None and n in (site.name, site.bias)}
        before = {n: layer.tensor(NAME, n) for n in layer.specs[NAME]} if adapter else {}
        try:
            module.update({n: nn.Parameter(self.read(self._key(site.module, n)), False) for n in empty})
            if adapter:
                self._fill(layer)
            yield
        finally:
            module.update(empty)
            for name, tensor in before.items():
                layer.put(NAME, name, tensor, layer.specs[NAME][name])

    def _fill(self, layer: AdaptedLayer) -> None:
        """A layer's part of the adapter: what its method makes of the weight first, then what the file has."""
        method, path = layer.methods[NAME], self.paths[layer]
        if method.derived(self.config):
            for name, spec in layer.specs[NAME].items():
                empty = torch.empty_like(layer.tensor(NAME, name), device=self.device, requires_grad=False)
                layer.put(NAME, name, as_held(empty, spec), spec)
            p = layer.view(NAME)
            own = {attribute(n): layer.tensor(NAME, n).detach() for n in layer.specs[NAME]}
            rebased = method.init(p.over(own))
            if rebased is not None:
                layer.site.write(rebased, None)
        given = {k[len(path) + 1 :]: t for k, t in self.tensors.items() if k.startswith(f"{path}.")}
        for key, tensor in layer.unpack(NAME, given).items():
            if key in layer.state(NAME):
                layer.assign(NAME, key, tensor)

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
        if self.parted and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
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
