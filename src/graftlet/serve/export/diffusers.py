# SPDX-License-Identifier: Apache-2.0
"""diffusers: one `pytorch_lora_weights.safetensors` for a pipeline, each part's keys after the part's name.

A second export into the same folder adds another part: the UNet's adapter first, the text encoder's after it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CallError
from ...files import TensorFile
from ...model.save import save_tensors
from .plain import Plain
from .target import Exported, Options, target
from .vllm import named

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"
"""In the file's metadata: what diffusers makes its LoRA config of, as JSON."""

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
KINDS = {"UNet": "unet", "Transformer": "transformer", "TextModel": "text_encoder", "T5Encoder": "text_encoder_3"}
"""What a part of a pipeline is, by a word in its class's name."""


@target("diffusers", embeddings=False, kernels=True, biases=True)
def write(plain: Plain, out: Path, options: Options) -> Exported:
    """A folder for `pipeline.load_lora_weights`."""
    component, path = _component(plain, options), out / WEIGHTS
    tensors, settings = _without(component, path)
    for layer, pair in plain.layers.items():
        tensors.update({f"{component}.{layer}.{key}": tensor for key, tensor in named(pair).items()})
    mine = {"r": plain.rank, "lora_alpha": plain.rank, "target_modules": sorted(plain.layers)}
    if any(pair.bias is not None for pair in plain.layers.values()):
        mine["lora_bias"] = True
    settings.update({f"{component}.{name}": value for name, value in mine.items()})
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {SETTINGS: json.dumps(settings, indent=2, sort_keys=True)})
    return Exported([path], f"pipeline.load_lora_weights({str(out)!r})", plain.rank, plain.lost)


def _component(plain: Plain, options: Options) -> str:
    made_of = str((plain.config.auto_mapping or {}).get("base_model_class", ""))
    guessed = next((part for word, part in KINDS.items() if word in made_of), None)
    component = options.component or guessed
    if component not in COMPONENTS:
        given = f"component={component!r}" if component else f"the adapter's base is {made_of or 'not known'}"
        raise CallError(f"{given}; say which part of the pipeline it is for: {', '.join(COMPONENTS)} (--component).")
    return component


def _without(component: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds of other parts: its tensors, and its settings."""
    if not path.is_file():
        return {}, {}
    file = TensorFile(path)
    settings = json.loads(file.metadata.get(SETTINGS, "{}"))
    kept = {k: t for k, t in file.read("cpu").items() if not k.startswith(f"{component}.")}
    return kept, {k: v for k, v in settings.items() if not k.startswith(f"{component}.")}
