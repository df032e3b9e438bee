# SPDX-License-Identifier: Apache-2.0
"""The layers of a file as an adapter of ours: its config, and its tensors by their key.

Each layer's tensors are compared with the layer before anything is made, so that a file cannot ask for more than it holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...config import PeftConfig
from ...errors import AdapterFileError, ConversionError, listing
from ...methods.loha import LoHaConfig
from ...methods.lokr import LoKrConfig, factorization
from ...methods.lora import LoraConfig
from ...weights.site import Conv, Site


@dataclass(frozen=True)
class Layer:
    """One layer of a file, with the layer of the model that it is for. alpha: None where the file does not say."""

    path: str
    site: Site
    tensors: dict[str, Tensor]
    alpha: float | None

    def refuse(self, why: str) -> NoReturn:
        raise AdapterFileError(f"the file's tensors for {self.path!r} {why}: damaged, or for another model.")

    def shaped(self, name: str, *shape: int) -> Tensor:
        """A tensor, which must have as many numbers as this shape, in it."""
        tensor = self.tensors.get(name)
        if tensor is None:
            self.refuse(f"have no {name!r}")
        wanted = torch.Size(shape)
        trimmed = [n for n in tensor.shape if n != 1]
        if 0 in tensor.shape or trimmed != [n for n in wanted if n != 1]:
            self.refuse(f"have {name!r} of shape {tuple(tensor.shape)}; {tuple(wanted)} is needed")
        return tensor.reshape(wanted)

    def rank(self, name: str, side: int) -> int:
        """The rank that a factor's side says: at most the weight's larger side, beyond which a rank means nothing."""
        tensor = self.tensors[name]
        rank = tensor.shape[side] if tensor.dim() > side else 0
        if not 0 < rank <= max(self.site.features_out, self.site.columns):
            self.refuse(f"have {name!r} of shape {tuple(tensor.shape)}, which is of no rank")
        return rank


@dataclass(frozen=True)
class Read:
    """What was read of one layer: its rank, the factor on its change, and its tensors by the end of their key."""

    rank: int
    scaling: float
    tensors: dict[str, Tensor]
    used: frozenset[str] = frozenset()

    @property
    def taken(self) -> frozenset[str]:
        """What it was read from."""
        return self.used | self.tensors.keys()


Reading = tuple[PeftConfig, dict[str, Read]]


def read(layers: list[Layer], origin: str) -> Reading:
    """The layers as one adapter. Raises `ConversionError` where they are of several methods."""
    kinds = [next((name for mark, name in MARKS.items() if mark in x.tensors), "no method") for x in layers]
    if len(set(kinds)) > 1 or kinds[0] not in READERS:
        some = {kind: layers[kinds.index(kind)].path for kind in set(kinds)}
        raise ConversionError(
            f"{origin} is of {listing(f'{kind} (as on {path!r})' for kind, path in sorted(some.items()))}; an adapter is of "
            "one method. Convert it with the tool that wrote it."
        )
    config, found = READERS[kinds[0]](layers, origin)
    for x in layers:
        if extra := sorted(x.tensors.keys() - found[x.path].taken):
            raise ConversionError(f"{origin} has {listing(extra)} on {x.path!r}, which {kinds[0]} is not read with.")
    return config, found


# LoRA


def lora(layers: list[Layer], origin: str) -> Reading:
    """LoRA, with DoRA's magnitudes where all layers have them."""
    scaled = [x for x in layers if x.tensors.keys() & {"magnitude", "dora_scale"}]
    biased = [x for x in layers if "bias" in x.tensors]
    for some, what in ((scaled, "DoRA's magnitudes"), (biased, "biases")):
        if some and len(some) < len(layers):
            raise ConversionError(
                f"{origin} has {what} on {len(some)} of {len(layers)} layers; all or none can have them."
            )
    found = {x.path: _pair(x) for x in layers}
    config = LoraConfig(use_dora=bool(scaled), lora_bias=bool(biased), **_settings("lora_alpha", found))
    return config, found


def _pair(x: Layer) -> Read:
    site, r = x.site, x.rank("down", 0)
    if site.groups > 1:
        x.refuse("are on a convolution with groups, which trainers write in different ways")
    if "mid" in x.tensors:  # down and up are 1x1 there, and the kernel is between them
        inner = x.shaped("down", r, site.features_in)
        A = torch.einsum("or...,ri->oi...", x.shaped("mid", r, r, *site.kernel).float(), inner.float()).to(inner.dtype)
    else:
        A = x.shaped("down", r, site.features_in, *site.kernel)
    B = x.shaped("up", site.features_out, r, *[1] * len(site.kernel))
    tensors = {"lora_A.weight": A.contiguous(), "lora_B.weight": B.contiguous()}
    if (magnitude := _magnitude(x)) is not None:
        tensors["lora_magnitude_vector"] = magnitude
    if "bias" in x.tensors:
        tensors["lora_B.bias"] = x.shaped("bias", site.features_out)
    return Read(r, (r if x.alpha is None else x.alpha) / r, tensors, LORA)


def _magnitude(x: Layer) -> Tensor | None:
    """DoRA's magnitudes of a layer, one an output."""
    out = x.site.features_out
    kept = (1, out, *[1] * len(x.site.kernel)) if isinstance(x.site, Conv) else (out,)
    theirs = x.tensors.get("dora_scale")
    if theirs is None:
        return x.shaped("magnitude", *kept) if "magnitude" in x.tensors else None
    if theirs.dim() < 2 or theirs.shape[0] != out or theirs.numel() != out:
        raise ConversionError(
            f"dora_scale of {x.path!r} is of shape {tuple(theirs.shape)}: one magnitude an input, where DoRA has one an "
            "output. Train it with wd_on_out=True, or merge it with LyCORIS."
        )
    return theirs.reshape(kept)


# LoHa and LoKr


def loha(layers: list[Layer], origin: str) -> Reading:
    """LoHa, with a core on all convolutions or on none."""
    cored = _cored(layers, "hada_t1", origin)
    found = {x.path: _hadamard(x) for x in layers}
    return LoHaConfig(use_effective_conv2d=cored, **_settings("alpha", found)), found


def _hadamard(x: Layer) -> Read:
    site, r = x.site, x.rank("hada_w1_b", 0)
    if "hada_t1" in x.tensors:
        a, b = (r, site.features_out), (r, site.shape[1])
        core = (r, r, *site.kernel, *[1] * (len(site.kernel) == 1))
        shapes = {"hada_t1": core, "hada_t2": core}
    else:
        a, b, shapes = (site.features_out, r), (r, site.columns), {}
    shapes.update({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b})
    return Read(r, (r if x.alpha is None else x.alpha) / r, {n: x.shaped(n, *s) for n, s in shapes.items()})


def lokr(layers: list[Layer], origin: str) -> Reading:
    """LoKr, whose factor is the one that splits every layer as the file has it."""
    firsts = {x.path: _first(x) for x in layers}
    factors = [f for f in [-1, *sorted({n for pair in firsts.values() for n in pair})] if _fits(f, layers, firsts)]
    if not factors:
        raise ConversionError(f"{origin} splits its layers by no one factor; LoKr's decompose_factor is one for all.")
    cored = _cored(layers, "lokr_t2", origin)
    found = {x.path: _kronecker(x, firsts[x.path]) for x in layers}
    both = any("lokr_w1_a" in x.tensors for x in layers)
    return LoKrConfig(
        decompose_factor=factors[0], decompose_both=both, use_effective_conv2d=cored, **_settings("alpha", found)
    ), found


def _first(x: Layer) -> tuple[int, int]:
    """The shape of W1."""
    whole, a, b = (x.tensors.get(n) for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b"))
    if whole is not None and whole.dim() == 2:
        return whole.shape[0], whole.shape[1]
    if a is not None and b is not None and a.dim() == b.dim() == 2:
        return a.shape[0], b.shape[1]
    return x.refuse("have no W1")


def _fits(factor: int, layers: list[Layer], firsts: Mapping[str, tuple[int, int]]) -> bool:
    if factor == 0:
        return False
    return all(
        tuple(factorization(size, factor)[0] for size in (x.site.features_out, x.site.features_in)) == firsts[x.path]
        for x in layers
    )


def _kronecker(x: Layer, first: tuple[int, int]) -> Read:
    site, (j, m) = x.site, first
    k, n = site.features_out // j, site.features_in // m
    thin = [name for name in ("lokr_w2_b", "lokr_w1_b") if name in x.tensors]
    r = x.rank(thin[0], 0) if thin else max(k, n)
    shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (j, m)} if "lokr_w1" in x.tensors else {
        "lokr_w1_a": (j, r), "lokr_w1_b": (r, m)}  # fmt: skip
    if "lokr_w2" in x.tensors:
        shapes["lokr_w2"] = (k, n, *site.kernel)
    elif "lokr_t2" in x.tensors:
        core = (r, r, *site.kernel, *[1] * (len(site.kernel) == 1))
        shapes.update({"lokr_t2": core, "lokr_w2_a": (r, k), "lokr_w2_b": (r, n)})
    else:
        shapes.update({"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * torch.Size(site.kernel).numel())})
    scaling = (r if x.alpha is None else x.alpha) / r if thin else 1.0  # two whole factors are not scaled
    return Read(r, scaling, {name: x.shaped(name, *shape) for name, shape in shapes.items()})


def _cored(layers: list[Layer], core: str, origin: str) -> bool:
    """Whether convolutions have a core. Raises `ConversionError` where only some do."""
    kernels = [x for x in layers if torch.Size(x.site.kernel).numel() > 1 and "lokr_w2" not in x.tensors]
    having = [x for x in kernels if core in x.tensors]
    if having and len(having) < len(kernels):
        raise ConversionError(
            f"{origin} has a core on {len(having)} of {len(kernels)} convolutions; all or none can have one."
        )
    return bool(having)


def _settings(alpha: str, found: Mapping[str, Read]) -> dict[str, Any]:
    """Ranks and alphas of all layers as a config's fields; `alpha` is what the config calls the common one."""
    r = Counter(one.rank for one in found.values()).most_common(1)[0][0]
    return {
        "r": r,
        alpha: r,
        "target_modules": set(found),
        "rank_pattern": {_exactly(path): one.rank for path, one in found.items() if one.rank != r},
        "alpha_pattern": {
            _exactly(path): one.rank * one.scaling for path, one in found.items() if one.rank * one.scaling != r
        },
    }


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}"


def keyed(found: Mapping[str, Read]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their key in the adapter format."""
    for path, one in found.items():
        for name, tensor in one.tensors.items():
            yield f"base_model.model.{path}.{name}", tensor


MARKS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr"}
"""A tensor that a layer of each method has."""

LORA = frozenset({"down", "up", "mid", "magnitude", "dora_scale", "bias"})
"""All that LoRA is read from."""

READERS: dict[str, Callable[[list[Layer], str], Reading]] = {"LoRA": lora, "LoHa": loha, "LoKr": lokr}
