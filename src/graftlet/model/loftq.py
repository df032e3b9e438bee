# SPDX-License-Identifier: Apache-2.0
"""LoftQ on a model that is quantised already: the adapter takes over what the quantisation lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.host import hosts
from ..core.layer import AdaptedLayer
from ..errors import AdapterFileError, ConfigError
from ..files import find_file
from ..methods.init.loftq import halves
from ..methods.init.loftq import loftq_init as loftq_init
from ..methods.lora import factors
from .origin import base_name

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Fill a LoRA adapter on a quantised model with what each of its layers lost, read from the whole weights' file.

    Args:
        model_path: the whole model: a safetensors file, its folder, or the base's own name where None.
        callback: called after each layer with the model and the layer's path; where it returns False, the layer's adapter
            is as it was. So a layer can be kept out that does the model no good.

    Raises:
        ConfigError: no quantised layer has the adapter. AdapterFileError: the file is not there, or lacks a weight.
    """
    found = [(path, h) for path, h in hosts(peft_model) if isinstance(h, AdaptedLayer) and adapter_name in h.methods]
    layers = [h for _, h in found if not h.site.storage.exact]
    if not layers:
        raise ConfigError(
            f"no layer with adapter {adapter_name!r} is quantised, so nothing is lost in it. Give a plain model "
            "init_lora_weights='loftq'."
        )
    whole = _Whole(peft_model, model_path)
    for layer in layers:
        key = layer.keys[adapter_name]
        pair = factors(layer.view(adapter_name))
        before = [t.clone() for t in pair]
        _fill(layer, adapter_name, layer.site.canonical(whole.weight(f"{key}.{layer.site.name}")))
        if callback is not None and not callback(peft_model, key):
            for tensor, value in zip(pair, before, strict=True):
                tensor.copy_(value)


def _fill(layer: AdaptedLayer, name: str, whole: Tensor) -> None:
    kept, _ = layer.original()
    lost = whole.to(kept.device).float() - kept.float()
    A, B = halves(lost, layer.r[name])
    for tensor, value in zip(factors(layer.view(name)), (A, B), strict=True):
        tensor.copy_(value / layer.scaling[name] ** 0.5)


class _Whole:
    """The weights of a model on disk, in one file or several, each read as it is asked for."""

    def __init__(self, model: nn.Module, path: str | os.PathLike[str] | None) -> None:
        base: Any = getattr(model, "get_base_model", lambda: model)()
        source = base_name(base) if path is None else path
        if source is None:
            raise ConfigError("model_path is needed: the model does not say where its whole weights are.")
        self.prefix = f"{getattr(base, 'base_model_prefix', '')}."
        file = Path(source)
        if file.suffix == ".safetensors":
            self.folder, self.places = file.parent, None if file.is_file() else self._places(file.parent)
            self.single = file
        else:
            self.single, self.places = self._found(source)
            self.folder = self.single.parent

    def _found(self, source: str | os.PathLike[str]) -> tuple[Path, dict[str, str] | None]:
        try:
            return find_file(source, WHOLE), None
        except AdapterFileError:
            index = find_file(source, INDEX)
            return index, self._places(index.parent)

    def _places(self, folder: Path) -> dict[str, str]:
        try:
            return json.loads((folder / INDEX).read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise AdapterFileError(f"{folder} has neither {WHOLE} nor a readable {INDEX}.") from error

    def weight(self, name: str) -> Tensor:
        """A weight by its name in the model, with or without the prefix that some files leave out."""
        for key in (name, name.removeprefix(self.prefix)):
            file = self.single if self.places is None else self.folder / self.places.get(key, "")
            if file.is_file():
                with safe_open(file, "pt") as opened:
                    if key in opened.keys():  # noqa: SIM118  not a dict
                        return opened.get_tensor(key)
        raise AdapterFileError(f"{self.folder} has no weight {name!r}; it is another model's.")
