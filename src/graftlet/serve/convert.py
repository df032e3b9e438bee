# SPDX-License-Identifier: Apache-2.0
"""Any adapter as LoRA: the change of each layer's weight, cut to its largest singular parts.   dW ~ U S V^T,  B = U S,  A = V^T

What every engine serves is LoRA; so whatever a method does to a weight can be served once it stands as B A.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.host import Shell, check_known, commons, hosts
from ..core.layer import AdaptedLayer
from ..core.lifecycle import adapters_of
from ..core.replace import ModulesToSaveWrapper
from ..core.svd import leading, share
from ..core.target import by_pattern, shortened, walk
from ..errors import CallError, ConfigError, ConversionError, ConversionWarning, listing, warn
from ..methods.lora import LoraConfig
from ..model import save
from ..model.parts import configs_of, root_of
from ..weights.rounding import finite
from ..weights.site import Attention, Embedding, Parameter, Site

SHARE = 0.99
"""The share of each layer's change that is kept where nobody says otherwise."""


@dataclass(frozen=True)
class Fit:
    """How a layer came out. error: `|dW - B A| / |dW|`, 0 for an adapter that changes nothing there."""

    rank: int
    error: float


@dataclass(frozen=True)
class Conversion:
    """An adapter as LoRA: its config, the file's tensors, and how each layer came out, by the layer's path."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: dict[str, Fit]


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter of any method that can be merged, as a LoRA adapter: its config and the tensors of its file.

    Args:
        model: the model with the adapter in its layers.
        rank: an int: the rank of every layer. A float, over 0 and at most 1: each layer's rank is the fewest singular
            values that hold this share of the sum of their squares.
        progressbar: show one. compile_kwargs: compile the decomposition, with these arguments for `torch.compile`.

    Raises:
        ConfigError: the rank is none, or larger than a layer has. It is a `ValueError` and a `TypeError`.
        ConversionError: the adapter has no weight that stands for it, or has taken a part out of the base.
        AdapterNameError: there is no such adapter.
    """
    made = converted(model, rank, adapter_name, progressbar, compile_kwargs)
    return made.config, made.tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write an adapter of any method into a folder as a LoRA adapter. Arguments and errors: `convert_to_lora`."""
    write(converted(model, rank, adapter_name, progressbar, compile_kwargs), path)


def write(made: Conversion, path: str | os.PathLike[str]) -> None:
    """Write a conversion into a folder: the config and the tensors of an adapter."""
    folder = Path(path)
    if folder.is_file():
        raise CallError(f"{folder} is a file; a folder is needed to write an adapter into.")
    save.save_adapter(folder, save.saved_config(made.config), made.tensors)


@torch.no_grad()
def converted(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> Conversion:
    """`convert_to_lora`, with the error of each layer."""
    _check_rank(rank)
    root = root_of(model)
    layers = _layers(root, adapter_name)
    split: Split = _split if compile_kwargs is None else torch.compile(_split, **compile_kwargs)
    changes = {path: _bias_change(layer, adapter_name) for path, layer in layers.items()}
    biased = any(db is not None and bool(db.any()) for db in changes.values())
    _check_bias(layers, adapter_name, biased)
    tensors, found = _others(root, adapter_name, layers), dict[str, Fit]()
    for path, layer in _shown(layers.items(), progressbar, len(layers)):
        pair, found[layer.keys[adapter_name]] = _as_pair(layer, adapter_name, rank, split)
        if biased:
            db = changes[path]
            like = next(iter(pair.values()))
            pair["lora_B.bias"] = like.new_zeros(layer.site.features_out) if db is None else db.to(like)
        tensors.update({f"{path}.{key}": tensor for key, tensor in pair.items()})
    config = _config(root, adapter_name, layers, {key: fit.rank for key, fit in found.items()}, biased)
    return Conversion(config, tensors, found)


# what can be converted


def _check_rank(rank: object) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    part = isinstance(rank, float) and 0 < rank <= 1
    if not whole and not part:
        raise ConfigError(
            f"rank={rank!r}; allowed: a positive int, the rank of every layer, or a float over 0 and at most 1, the share "
            "of each layer's change that is kept."
        )


def _layers(model: nn.Module, adapter: str) -> dict[str, AdaptedLayer]:
    """The layers that an adapter changes, by path. Raises where it does something that is no change of a weight."""
    check_known([adapter], list({**configs_of(model), **dict.fromkeys(adapters_of(model))}))
    kept = _kept_whole(model)
    found = {path: h for path, h in hosts(model) if adapter in h.adapters and id(h) not in kept}
    layers = {path: h for path, h in found.items() if isinstance(h, AdaptedLayer)}
    config = configs_of(model).get(adapter)
    if len(layers) < len(found) or not layers:
        kinds = sorted({type(h).__name__ for h in found.values() if not isinstance(h, AdaptedLayer)})
        raise ConversionError(
            f"adapter {adapter!r} ({getattr(config, 'peft_type', 'unknown')}) changes no weight of a layer"
            f"{f' but replaces or wraps it ({listing(kinds)})' if kinds else ''}; LoRA cannot stand for it."
        )
    for path, layer in layers.items():
        if why := layer.methods[adapter].unmergeable:
            raise ConversionError(f"adapter {adapter!r} cannot be converted, since on {path!r} {why}.")
        if adapter in layer.rebased:
            raise ConversionError(
                f"adapter {adapter!r} has taken a part of the weight of {path!r} into itself as it started, so what it "
                "adds is not what it changes. Save it with path_initial_model_for_weight_conversion."
            )
    if config is not None and isinstance(config, LoraConfig):
        warn(ConversionWarning, f"adapter {adapter!r} is a LoRA adapter already; converting it saves rank at best.", 5)
    return layers


def _kept_whole(model: nn.Module) -> set[int]:
    """The wrappers that a LoRA adapter has too: copies of modules, and rows of tokens."""
    shells = {id(m.inner) for m in model.modules() if isinstance(m, Shell)}
    return shells | {id(h) for _, h in hosts(model) if isinstance(h, ModulesToSaveWrapper)}


def _bias_change(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    return layer.change(adapter)[1]


def _check_bias(layers: Mapping[str, AdaptedLayer], adapter: str, biased: bool) -> None:
    without = [p for p, h in layers.items() if not h.site.has_bias or isinstance(h.site, (Attention, Embedding))]
    if biased and without:
        raise ConfigError(
            f"adapter {adapter!r} changes biases, which LoRA can do on all its layers or on none (lora_bias), and "
            f"{listing(without, 4)} can have none; convert adapters of these layers apart."
        )


def _others(model: nn.Module, adapter: str, layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """What stands in the adapter's file beside the layers' own: copies of modules, rows of tokens, the base's biases."""
    own = {f"{path}.{key}" for path, h in layers.items() for key in h.pack(adapter)}
    shared = [path for path, box in commons(model) if adapter in box]
    collected = save.get_peft_model_state_dict(model, adapter_name=adapter)
    return {k: t for k, t in collected.items() if k not in own and not any(_below(k, path) for path in shared)}


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}.")


# the decomposition

Split = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(matrix `[out, in]`, rank or share) -> B `[out, r]` and A `[r, in]`."""


def _split(M: Tensor, rank: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = leading(M, rank) if isinstance(rank, int) else share(M, rank)
    return U * S, Vh


def _as_pair(layer: AdaptedLayer, adapter: str, rank: float, split: Split) -> tuple[dict[str, Tensor], Fit]:
    """A layer's change as LoRA's tensors, by their key in the file."""
    site, dW = layer.site, layer.change(adapter)[0]
    if not finite(dW):
        raise ConversionError(
            f"adapter {adapter!r} holds NaN or Inf on {layer.keys[adapter]!r}; it cannot be converted."
        )
    M = matrices(site, dW)
    pairs = [split(part, _rank_on(layer, adapter, M, rank)) for part in M]
    widest = max(len(A) for _, A in pairs)
    pairs = [(B, A) if len(A) == widest else split(part, widest) for part, (B, A) in zip(M, pairs, strict=True)]
    dtype = layer.view(adapter).dtype
    B, A = torch.stack([b for b, _ in pairs]).to(dtype), torch.stack([a for _, a in pairs]).to(dtype)
    lost = (M - B.to(M.dtype) @ A.to(M.dtype)).norm() / M.norm().clamp_min(torch.finfo(M.dtype).tiny)
    return named(site, B, A), Fit(widest * site.groups, float(lost))


def _rank_on(layer: AdaptedLayer, adapter: str, M: Tensor, rank: float) -> float:
    """The rank of each of a layer's matrices: all of it, or the share of a convolution's group."""
    groups, most = layer.site.groups, min(M.shape[1:]) * layer.site.groups
    if not isinstance(rank, int):
        return rank
    if rank > most or rank % groups:
        multiple = f" and must be a multiple of its {groups} groups" if groups > 1 else ""
        raise ConfigError(
            f"rank={rank} on {layer.keys[adapter]!r}, whose change has at most {most}{multiple}; choose a lower one, or a "
            "share as a float, which gives each layer its own."
        )
    return rank // groups


def matrices(site: Site, dW: Tensor) -> Tensor:
    """A change of a site's weight as the matrices `[n, out, columns]` that LoRA factors one by one.

    One for a layer; one an expert of a stack; one a group of a convolution, over the inputs of all groups.
    """
    if site.stack:
        return dW
    whole = torch.empty(site.features_out, site.features_in, *site.kernel, device="meta")
    return site.fit(dW, whole).flatten(1).unflatten(0, (site.groups, -1))


def named(site: Site, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """Stacks of factors `[n, out, r]` and `[n, r, columns]` as the format has them on a site, by their key in the file."""
    first = A.flatten(0, 1).unflatten(1, (-1, *site.kernel)).contiguous()
    if site.stack:
        return {"lora_A.weight": first, "lora_B.weight": B.permute(1, 2, 0).flatten(1).contiguous()}
    second = B.flatten(0, 1)[(..., *[None] * len(site.kernel))].contiguous()
    if isinstance(site, Embedding):
        return {"lora_embedding_A": first, "lora_embedding_B": second}
    return {"lora_A.weight": first, "lora_B.weight": second}


# the config

CARRIED = (
    "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "fan_in_fan_out", "task_type",
    "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
)  # fmt: skip
"""Fields of any method's config that mean the same in LoRA's."""


def _config(
    model: nn.Module, adapter: str, layers: Mapping[str, AdaptedLayer], ranks: Mapping[str, int], biased: bool
) -> LoraConfig:
    theirs = configs_of(model).get(adapter)
    known = set() if theirs is None else {f.name for f in fields(theirs)}
    values: dict[str, Any] = {n: copy.copy(getattr(theirs, n)) for n in CARRIED if n in known}
    bias = "none" if theirs is None else theirs.bias
    modules = {h.keys[adapter] for h in layers.values() if not isinstance(h.site, Parameter)}
    bare = [h.keys[adapter] for h in layers.values() if isinstance(h.site, Parameter)]
    if bare and not values.get("target_parameters"):
        values["target_parameters"] = list(reversed(bare))  # the innermost wrapper came first
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = _pattern(ranks, r)
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern={k: float(v) for k, v in pattern.items()},
        target_modules=shortened(modules, [p.path for p in walk(_inner(model))]) if modules else [],
        lora_bias=biased,
        bias=bias if bias in ("none", "all") else "lora_only",
        **values,
    )


def _inner(model: nn.Module) -> nn.Module:
    getter: Any = getattr(model, "get_base_model", None)
    return getter() if callable(getter) else model  # pyright: ignore[reportReturnType]


def _pattern(ranks: Mapping[str, int], r: int) -> dict[str, int]:
    """`rank_pattern` for these ranks: the layers that differ, or all where one's path is the end of another's."""
    longest = sorted(ranks, key=len, reverse=True)
    short = {key: ranks[key] for key in longest if ranks[key] != r}
    right = all(by_pattern(short, key, r) == rank for key, rank in ranks.items())
    return short if right else {key: ranks[key] for key in longest}


def _shown(items: Iterable[Any], progressbar: bool, total: int) -> Iterable[Any]:
    if not progressbar:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="converting to LoRA", total=total, unit="layer")
