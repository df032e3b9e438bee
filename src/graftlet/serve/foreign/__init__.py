# SPDX-License-Identifier: Apache-2.0
"""Adapters that other trainers wrote, as adapters of a model here: kohya's sd-scripts, LyCORIS, diffusers.

A file comes from a stranger: it is a safetensors file whose header is checked first, it names no code, and each tensor is
compared with the layer that it is for before anything is made.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...config import PeftConfig
from ...core.state import check_finite
from ...core.target import by_pattern
from ...errors import AdapterFileError, PeftError
from ...files import TensorFile
from ...methods.lora import LoraConfig
from ...model import save
from ...model.mapping import get_peft_model
from ...weights.site import Conv, Linear, Site, site_of
from . import families
from .names import placed
from .words import Named, chosen, grouped

if TYPE_CHECKING:
    from ...model.peft_model import PeftModel

SETTINGS = "lora_adapter_metadata"
"""In the metadata of a file of diffusers: its LoRA configs as JSON, each field after the name of its part."""


@dataclass(frozen=True)
class Foreign:
    """A file as an adapter of ours: its config, and its tensors by their key in the adapter format."""

    config: PeftConfig
    tensors: dict[str, Tensor]
    origin: str


def load_foreign(
    model: nn.Module,
    file: str | os.PathLike[str],
    adapter_name: str = "default",
    component: str | None = None,
) -> PeftModel:
    """Put an adapter of another trainer on a model, which it wraps; `save_pretrained` then writes it in the adapter format.

    Args:
        model: what the adapter is for, such as `pipeline.unet`; or a `PeftModel`, which gets one adapter more.
        file: a safetensors file by kohya's sd-scripts (LoRA, with a core, with DoRA), LyCORIS (LoHa, LoKr) or diffusers.
        component: the part of a file for several: unet, transformer, text_encoder, text_encoder_2 or text_encoder_3.

    Raises:
        AdapterFileError: the file is damaged, holds NaN, is a pickle, or is for another model. The model is as it was.
        ConversionError: it is of several methods at once. CallError: the part has to be said.
    """
    from ...model.peft_model import PeftModel

    adapted = isinstance(model, PeftModel)
    foreign = read_foreign(model.get_base_model() if adapted else model, file, component)
    if adapted:
        model.add_adapter(adapter_name, foreign.config, low_cpu_mem_usage=True)
        wrapped, undo = model, lambda: model.delete_adapter(adapter_name)
    else:
        wrapped = get_peft_model(model, foreign.config, adapter_name, low_cpu_mem_usage=True)
        undo = wrapped.unload
    try:
        given = save.Stored(Path(file), None, foreign.tensors, "cpu", None)
        save.load_verified(wrapped, given, adapter_name, strict=True, origin=foreign.origin)
    except PeftError:
        undo()
        raise
    return wrapped.eval()


def read_foreign(model: nn.Module, file: str | os.PathLike[str], component: str | None = None) -> Foreign:
    """A file of another trainer as an adapter for `model`, which is not changed. Arguments and errors: `load_foreign`."""
    path = Path(file)
    if path.suffix != ".safetensors":
        raise AdapterFileError(
            f"{path} is no safetensors file. Other kinds are pickles, which can run code as they are read; convert it with "
            "the tool that wrote it."
        )
    opened, origin = TensorFile(path), str(path)
    tensors = opened.read("cpu")
    check_finite(tensors, origin)
    part, named = chosen(grouped(tensors, origin), component, origin)
    places = placed(model, [one.name for one in named], origin)
    told = _told(opened.metadata.get(SETTINGS), part, origin)
    layers = [_layer(one, *places[one.name], told) for one in named]
    config, found = families.read(layers, origin)
    return Foreign(config, dict(families.keyed(found)), origin)


def _layer(one: Named, path: str, module: nn.Module, told: LoraConfig | None) -> families.Layer:
    site = _site(path, module)
    alpha = one.tensors.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise AdapterFileError(f"the file's alpha for {path!r} is of shape {tuple(alpha.shape)}; one number is needed.")
    if alpha is not None:
        return families.Layer(path, site, one.tensors, float(alpha.float()))
    return families.Layer(path, site, one.tensors, None if told is None else _alpha(told, path))


def _site(path: str, module: nn.Module) -> Site:
    site = site_of(module)
    if not isinstance(site, (Linear, Conv)):
        raise AdapterFileError(
            f"the file adapts {path!r}, a {type(module).__name__}, where only layers with a weight can be."
        )
    return site


def _told(text: str | None, part: str, origin: str) -> LoraConfig | None:
    """The LoRA config that diffusers wrote for a part, as far as it tells a scaling."""
    if text is None:
        return None
    try:
        values = json.loads(text)
        mine = {k.removeprefix(f"{part}."): v for k, v in values.items() if k.startswith(f"{part}.")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{origin}: its metadata {SETTINGS!r} are no JSON object.") from error
    known = {k: mine[k] for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora") if k in mine}
    return LoraConfig(**known) if "lora_alpha" in known else None


def _alpha(told: LoraConfig, path: str) -> float:
    """The alpha that, over the rank, is the scaling of a layer."""
    r = by_pattern(told.rank_pattern, path, told.r)
    alpha = by_pattern(told.alpha_pattern, path, told.lora_alpha)
    return alpha * r**0.5 if told.use_rslora else alpha
