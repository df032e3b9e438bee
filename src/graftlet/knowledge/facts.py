# SPDX-License-Identifier: Apache-2.0
"""What is known of a run: its config, model, environment and hardware. Heuristics are predicates on it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..requirements import version_of

if TYPE_CHECKING:
    from ..train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A value that is not known is None, or what makes no heuristic apply."""

    # the adapter
    method: str = "LORA"
    config: Mapping[str, Any] = field(default_factory=dict)
    """The fields that are set, by name."""

    # the model
    model: Mapping[str, Any] = field(default_factory=dict)
    """Its `config.json`."""
    quantised: str | None = None
    dtype: str | None = None
    resized: bool = False
    base_recorded: bool = True
    """The adapter's file has a sample of its base's weights."""
    old_file: bool = False
    """The adapter's file is of an older writer than this reference version."""
    pad_is_end: bool = False

    # training
    trains: bool = True
    batch: int = 8
    length: int = 1024
    accumulation: int = 1
    rate: float = 2e-4
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    reentrant: bool = False
    packing: bool = False
    attention: str = "sdpa"

    # what is done with it
    merges: bool = False
    combines: str | None = None
    serves: int = 0
    """How many adapters are served over one base."""
    compiles: bool = False
    swaps: bool = False

    # the environment and the machine
    transformers: str | None = None
    kernels: bool = True
    liger: bool = False
    device: str = "cpu"
    memory: int | None = None
    """Bytes of the device."""
    half: bool = True
    """The device computes in bfloat16."""

    @property
    def layers(self) -> int:
        """The model's blocks."""
        return int(self.model.get("num_hidden_layers") or 0)

    @property
    def width(self) -> int:
        """The model's hidden size."""
        return int(self.model.get("hidden_size") or 0)

    @property
    def vocabulary(self) -> int:
        """The model's tokens."""
        return int(self.model.get("vocab_size") or 0)

    @property
    def experts(self) -> int:
        """The experts a layer; 0 for a dense model."""
        return int(self.model.get("num_local_experts") or self.model.get("num_experts") or 0)

    @property
    def activations(self) -> int:
        """Bytes of what is kept for backward, roughly: 34 numbers of two bytes a token, a block and a unit of width."""
        size = 4 if self.dtype == "float32" else 2
        return 17 * size * self.batch * self.length * self.layers * self.width

    @property
    def logits(self) -> int:
        """Bytes of the logits and their gradient, in single precision."""
        return 8 * self.batch * self.length * self.vocabulary

    @property
    def rank(self) -> int:
        """The adapter's rank, where it has one."""
        return int(self.config.get("r") or 8)

    @property
    def prompt(self) -> bool:
        """Whether the method is a prompt."""
        return self.method in PROMPTS


PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")


def here() -> dict[str, Any]:
    """What is known of this machine and its packages."""
    import torch

    from ..core.kernel import kernels
    from ..train.base import computes_in_bfloat16, pick_device

    device = pick_device("auto")
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "memory": torch.cuda.get_device_properties(device).total_memory if cuda else _room(),
        "half": computes_in_bfloat16(device),
        "transformers": version_of("transformers"),
        "kernels": bool(kernels()),
        "liger": importlib.util.find_spec("liger_kernel") is not None,
    }


def _room() -> int | None:
    """Bytes of this machine's memory, where that can be told."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().total


def of_recipe(recipe: Recipe) -> Facts:
    """What a recipe says, with what is known of this machine. No weights are read."""
    import torch

    from ..train.base import computes_in_bfloat16, pick_device, pick_dtype

    training, model = recipe.training, recipe.model
    machine = here()
    device = pick_device(model.device)
    return Facts(
        **{**machine, "device": device.type, "half": computes_in_bfloat16(device)},
        method=recipe.adapter.method.upper(),
        config=_fields(recipe),
        model=_model(model.source),
        quantised=None if recipe.quantization is None else recipe.quantization.method,
        dtype=str(pick_dtype(model.dtype, torch.device(device))).removeprefix("torch."),
        batch=training.batch_size,
        length=recipe.data.max_length,
        accumulation=training.accumulation,
        rate=training.learning_rate,
        optimizer=training.optimizer,
        checkpointing=training.gradient_checkpointing,
        packing=training.packing,
        attention=model.attention,
        merges=recipe.evaluation.verify,
    )


def _fields(recipe: Recipe) -> dict[str, Any]:
    """The adapter's fields as given; a start under the name that LoRA has for it."""
    given = recipe.adapter.fields
    return given if recipe.adapter.init is None else {**given, "init_lora_weights": recipe.adapter.init}


def _model(source: str) -> dict[str, Any]:
    """The `config.json` of a base that is here; nothing for one that is not yet."""
    from ..train.sources import PACKAGE, cache_folder, package_files, packed_folder

    folders = [Path(source).expanduser()]
    if source.startswith(PACKAGE) and (packed := packed_folder(source)) is not None:
        folders = [Path(packed)]
    elif source.startswith(PACKAGE):
        stem = package_files(source, "*.gguf")[0].stem
        folders = sorted((cache_folder() / "models").glob(f"{stem}-*"))
    for folder in folders:
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text())
    return {}
