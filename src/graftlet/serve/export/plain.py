# SPDX-License-Identifier: Apache-2.0
"""An adapter as the least that every engine agrees on: two matrices a layer, whose product is what is added to the weight."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...core.host import check_known
from ...core.state import check_finite
from ...core.target import by_pattern
from ...errors import AdapterFileError, ConversionError, ConversionWarning
from ...methods import variants
from ...methods.init import initialiser
from ...methods.lora import LoraConfig
from ...model import save
from ...model.parts import configs_of, root_of
from ..convert import SHARE, Fit, converted

LAYERS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "EA", ".lora_embedding_B": "EB",
    ".lora_B.bias": "bias",
}  # fmt: skip
"""What a layer's tensors are called in the file, and what they are."""


@dataclass(frozen=True)
class Pair:
    """One layer's change: A `[r, in, *kernel]` and B `[out, r, *ones]`, and of the bias `[out]`. Nothing else scales it.

    embedding: a token's row of the change is its column of A times B.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Plain:
    """An adapter's layers by their path in the base.

    config: where it came from. others: what else stands in its file, by key. lost: how converted layers came out.
    """

    config: LoraConfig
    layers: dict[str, Pair]
    others: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, Fit] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max(len(p.A) for p in self.layers.values())


def from_folder(source: str | os.PathLike[str]) -> Plain:
    """A saved LoRA adapter. Raises `ConversionError` where its base is needed to tell what it does."""
    config, held = save.opened(source, None, save.Checks())
    if why := obstacle(config):
        raise ConversionError(f"{source}: {why}: what it does as LoRA is only known on its base. Load it there first.")
    assert isinstance(config, LoraConfig)
    tensors = held.read()
    check_finite(tensors, str(held.path))
    return _sorted(config, tensors, str(source))


def from_model(model: nn.Module, adapter: str, rank: float | None, engine: str) -> Plain:
    """An adapter in a model: LoRA as it is, unless a rank is asked for; any other method converted."""
    configs = configs_of(root_of(model))
    check_known([adapter], list(configs))
    config = configs[adapter]
    if rank is None and isinstance(config, LoraConfig):
        if why := obstacle(config):
            raise ConversionError(
                f"adapter {adapter!r}: {why}, which {engine} does not load. Convert it to LoRA by giving a rank "
                "(rank=16 for every layer, or rank=0.95 for a share of each layer's change; --rank or --energy), which "
                "tells what each layer loses; or export the whole model: to='merged' (--to merged)."
            )
        tensors = save.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        return _sorted(config, tensors, f"adapter {adapter!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)  # it was asked for
        made = converted(model, SHARE if rank is None else rank, adapter)
    return replace(_sorted(made.config, made.tensors, f"adapter {adapter!r}"), lost=made.layers)


def obstacle(config: PeftConfig) -> str | None:
    """Why an adapter's file alone is no plain LoRA; None where it is."""
    if not isinstance(config, LoraConfig):
        return f"it is {getattr(config.peft_type, 'value', config.peft_type)}, not LoRA"
    if (variant := variants.chosen(config)) is not None:
        return f"{variant.field} makes it more than LoRA"
    if config.layer_replication:
        return "layer_replication makes its layers others than the base's"
    if initialiser(config.init_lora_weights).rebases:
        return f"init_lora_weights={config.init_lora_weights!r} has taken a part of the base's weights"
    return None


def uniform(plain: Plain) -> Plain:
    """The same changes, every layer at the largest rank: one alpha, the rank, is then right for all of them."""
    return replace(plain, layers={path: _widened(pair, plain.rank) for path, pair in plain.layers.items()})


def _widened(pair: Pair, rank: int) -> Pair:
    more = rank - len(pair.A)
    if not more:
        return pair
    A = torch.cat([pair.A, pair.A.new_zeros(more, *pair.A.shape[1:])])
    B = torch.cat([pair.B, pair.B.new_zeros(len(pair.B), more, *pair.B.shape[2:])], 1)
    return replace(pair, A=A, B=B)


def _sorted(config: LoraConfig, tensors: Mapping[str, Tensor], origin: str) -> Plain:
    """A file's tensors by layer, each layer's scaling multiplied into B."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, part = split(key)
        if part is None:
            others[key] = tensor
        else:
            found.setdefault(path, {})[part] = tensor
    if not found:
        raise AdapterFileError(f"{origin} holds no LoRA layer.")
    return Plain(config, {path: _pair(config, path, parts, origin) for path, parts in found.items()}, others)


def split(key: str) -> tuple[str, str | None]:
    """A key in an adapter's file as a layer's path and one of A, B and bias; None where it is another tensor's."""
    path = key.removeprefix("base_model.model.")
    for ending, part in LAYERS.items():
        if path.endswith(ending):
            return path.removesuffix(ending), part
    return path, None


def _pair(config: LoraConfig, path: str, parts: Mapping[str, Tensor], origin: str) -> Pair:
    embedding = "EA" in parts or "EB" in parts
    A, B = (parts.get(f"E{name}" if embedding else name) for name in "AB")
    if A is None or B is None or A.dim() != B.dim() or A.dim() < 2:
        raise AdapterFileError(f"{origin}: {path!r} has no pair of factors; the file is damaged or no adapter.")
    r = by_pattern(config.rank_pattern, path, config.r)
    if len(A) != r or B.shape[1] != r:
        raise ConversionError(
            f"{origin}: {path!r} has factors of shape {tuple(A.shape)} and {tuple(B.shape)}, which are no plain LoRA of "
            f"rank {r}: a stack of experts, a grouped convolution, or the config is another adapter's. "
            "Export the whole model instead: to='merged' (--to merged)."
        )
    scaling = by_pattern(config.alpha_pattern, path, config.lora_alpha) / (r**0.5 if config.use_rslora else r)
    bias = parts.get("bias")
    return Pair(A, _scaled(B, scaling), None if bias is None else _scaled(bias, scaling), embedding)


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1 else (tensor.double() * scaling).to(tensor.dtype)
