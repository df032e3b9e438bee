# SPDX-License-Identifier: Apache-2.0
"""What keys are made of in files that other trainers write: a part of a pipeline, a layer's name, and what the tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...errors import AdapterFileError, CallError, listing

ENDINGS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".dora_scale": "dora_scale", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_B.bias": "bias",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    **{f".{n}": n for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{n}": n for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}  # fmt: skip
"""What a key ends in, and what its tensor is: of kohya's sd-scripts, of LyCORIS, of diffusers now and before."""

PARTS = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lora_transformer_": "transformer", "lycoris_": "",
    "unet.": "unet", "transformer.": "transformer", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3", "base_model.model.": "",
}  # fmt: skip
"""What a key begins with, and the part of a pipeline that it is for; "" where it does not say."""


@dataclass(frozen=True)
class Named:
    """One layer of a file: its name there, and its tensors by what they are (the values of `ENDINGS`)."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


def grouped(tensors: Mapping[str, Tensor], origin: str) -> dict[str, list[Named]]:
    """A file's tensors by part of the pipeline and layer. Raises `AdapterFileError` for one that is not known."""
    found: dict[str, dict[str, Named]] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = max((e for e in ENDINGS if key.endswith(e)), key=len, default=None)
        if ending is None:
            unknown.append(key)
            continue
        beginning = next((b for b in PARTS if key.startswith(b)), "")
        name = key.removesuffix(ending).removeprefix(beginning)
        layers = found.setdefault(PARTS.get(beginning, ""), {})
        held = layers.setdefault(name, Named(name)).tensors
        if ENDINGS[ending] in held:
            raise AdapterFileError(f"{origin}: {name!r} has two tensors that are its {ENDINGS[ending]!r}.")
        held[ENDINGS[ending]] = tensor
    if unknown:
        raise AdapterFileError(
            f"{origin} holds tensors of no method that is read here: {listing(unknown, 4)}. Read are LoRA (with DoRA), LoHa "
            "and LoKr, as kohya's sd-scripts, LyCORIS and diffusers write them."
        )
    return {part: list(layers.values()) for part, layers in found.items()}


def chosen(parts: Mapping[str, list[Named]], component: str | None, origin: str) -> tuple[str, list[Named]]:
    """The part that is asked for, or the only one there is. Raises `CallError` where it must be said, or is not there."""
    if component is not None and component not in parts:
        raise CallError(
            f"{origin} holds nothing for component={component!r}; it holds {listing(map(repr, sorted(parts)))}."
        )
    if component is None and len(parts) != 1:
        raise CallError(
            f"{origin} is for {len(parts)} parts of a pipeline; say which: component={listing(map(repr, sorted(parts)))}."
        )
    part = next(iter(parts)) if component is None else component
    return part, parts[part]
