# SPDX-License-Identifier: Apache-2.0
"""Merging a model of any size on disk: shard by shard, in the memory of one shard and one adapter.

What is written stays: an interrupted merge goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import CONFIG_NAME
from ..files import write_atomically
from . import save
from .merged import Merged

MANIFEST = "merging.json"


class Merge:
    """One merge on disk.

    Args:
        base: the folder of the base's files. adapter: the adapter's. out: where the merged model goes.
        skeleton: the base's class with its config, on meta (`skeleton_of`), in the dtype that is wanted.
        shard_size: of the largest file that is written, and so of the memory that is needed. device: where to compute.

    Raises:
        UnsupportedOptionError: the base cannot be read tensor by tensor, with the reason; it must be built then.
        MergeError: the adapter has no merged form. AdapterFileError: it does not fit.
    """

    def __init__(
        self, base: Path, adapter: str, out: Path, skeleton: Any, shard_size: int | str = "5GB", device: str = "cpu"
    ) -> None:
        self.adapter, self.out, self.skeleton, self.shard_size = adapter, out, skeleton, shard_size
        self.merged = Merged(base, adapter, skeleton, device)

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
                save.save_tensors({k: self.merged.tensor(k) for k in keys}, part / name)
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
        files = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in self.merged.base.paths}
        dtypes = sorted({str(d) for d in self.merged.dtypes.values()})
        return {"adapter": digest, "base": files, "dtypes": dtypes, "shard_size": str(self.shard_size)}

    def _shards(self) -> dict[str, list[str]]:
        """The tensors of each file, as transformers splits a model that it has read; what is tied stands there once."""
        from huggingface_hub import split_state_dict_into_shards_factory

        again = {key for keys in self.merged.tied if keys not in self.merged.parted for key in keys[1:]}
        kept = sorted((k for k in self.merged.state if k not in again), key=_natural)
        split = split_state_dict_into_shards_factory(
            {key: self.merged.state[key] for key in kept},
            get_storage_size=lambda t: t.nbytes,
            get_storage_id=lambda t: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=self.shard_size,
        )
        return dict(split.filename_to_tensors)

    def _index(self, part: Path, shards: dict[str, list[str]]) -> None:
        tensors = {k: self.merged.state[k] for keys in shards.values() for k in keys}
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
        if self.merged.parted and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        config.save_pretrained(part)
        if self.skeleton.can_generate():
            self.skeleton.generation_config.save_pretrained(part)


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
