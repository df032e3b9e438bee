# SPDX-License-Identifier: Apache-2.0
"""A small decoder of a model's own kind: made, told of embeddings, and set free."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import nn

from ...core.host import bare
from ...core.target import walk
from ...errors import ConfigError, UnsupportedLayerError, UnsupportedOptionError
from .heads import head_name
from .ready import bounded, relative

DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
WIDTH = ("hidden_size", "n_embd", "d_model")
INNER = ("intermediate_size", "ffn_dim", "n_inner")
HEADS = ("num_attention_heads", "n_head", "num_heads")
STACKS = ("layers", "h")
DIFFUSION = ("transformer_blocks", "single_transformer_blocks")


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that runs its blocks one after another, with its path.

    Raises:
        UnsupportedOptionError: a diffusion transformer, or an encoder and a decoder.
        UnsupportedLayerError: none is found.
    """
    config = getattr(model, "config", None)
    if any(name in model._modules for name in DIFFUSION) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedOptionError(
            f"{type(model).__name__}: a second state is carried through decoder-only language models alone, not through "
            "diffusion transformers or encoder-decoders."
        )
    inner: Any = getattr(config, "get_text_config", None)
    depth = getattr(inner() if callable(inner) else config, "num_hidden_layers", None)
    for path, module in [("", model), *((p.path, p.bare) for p in walk(model))]:
        if hasattr(module, "config") and any(len(stack_in(module, n)) == depth for n in STACKS):
            return path, module
    raise UnsupportedLayerError(f"{type(model).__name__} has no list {' or '.join(STACKS)} of {depth} decoder blocks.")


def stack_in(module: nn.Module, name: str) -> nn.ModuleList:
    """A module's list of blocks of this name; an empty one where it has none."""
    held = module._modules.get(name)
    return held if isinstance(held, nn.ModuleList) else nn.ModuleList()


def block_paths(model: nn.Module) -> set[str]:
    """The paths of a decoder's blocks."""
    path, decoder = decoder_of(model)
    name = next(n for n in STACKS if len(stack_in(decoder, n)))
    return {".".join([*([path] if path else []), name, str(i)]) for i in range(len(stack_in(decoder, name)))}


def width_of(config: Any) -> int:
    """How wide a model's hidden states are. Raises `UnsupportedLayerError` where its config does not say."""
    found = next((getattr(config, name) for name in WIDTH if hasattr(config, name)), None)
    if found is None:
        raise UnsupportedLayerError(f"the model's config has none of {', '.join(WIDTH)}: how wide are its blocks?")
    return int(found)


def mirror(model: nn.Module, depth: int, width: int | None, inner: int | None, heads: int | None) -> Any:
    """A new decoder like a model's, of other sizes where they are given."""
    _, decoder = decoder_of(model)
    config = copy.deepcopy(cast(Any, decoder).config)
    for names, value in ((DEPTH, depth), (WIDTH, width), (INNER, inner), (HEADS, heads)):
        if value is not None:
            _set(config, names, value)
    if kinds := list(getattr(config, "layer_types", None) or ()):
        config.layer_types = [*kinds[:depth], *kinds[-1:] * (depth - len(kinds))]
    if (windows := getattr(config, "max_window_layers", None)) is not None:
        config.max_window_layers = min(windows, depth)
    return type(decoder)(bounded(config))


def beside(model: nn.Module, made: nn.Module) -> nn.Module:
    """A new module in a model's dtype and place; one on meta stays there."""
    kept = next(p for p in model.parameters() if p.is_floating_point())
    on_meta = any(p.is_meta for p in made.parameters())
    return made.to(kept.dtype) if on_meta else made.to(kept.device, kept.dtype)


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    name = next((n for n in names if hasattr(config, n)), None)
    if name is None:
        raise ConfigError(f"a {type(config).__name__} has none of {', '.join(names)}, so {value} cannot be set there.")
    setattr(config, name, value)


def takes(decoder: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of these arguments that a decoder has; None where it has none of them."""
    known = inspect.signature(decoder.forward).parameters
    return next((name for name in names if name in known), None)


def standalone(model: nn.Module, decoder: nn.Module, head: nn.Module | None, embeddings: bool) -> nn.Module:
    """A model around another decoder, with a head where one is given; nothing is copied.

    It is of the model's class, or of the decoder's family where that is another one. embeddings: the decoder uses the model's.
    """
    path, own = decoder_of(model)
    if embeddings:
        table = cast(Any, model).get_input_embeddings()
        name = next(n for n, m in own._modules.items() if m is not None and bare(m) is bare(table))
        decoder = _twin(decoder)
        setattr(decoder, name, table)
    if not path:
        return decoder
    with torch.device("meta"):
        made = type(model)(cast(Any, decoder).config) if type(decoder) is type(own) else relative(model, decoder)
    parts = {decoder_of(made)[0]: decoder} | ({} if head is None else {str(head_name(made)): head})
    for place, module in parts.items():
        parent, _, child = place.rpartition(".")
        setattr(made.get_submodule(parent), child, module)
    if left := [n for n, t in made.state_dict(keep_vars=True).items() if t.is_meta]:
        raise UnsupportedOptionError(
            f"a {type(made).__name__} cannot stand without {left[0]}, which is the base's alone."
        )
    if (settings := getattr(model, "generation_config", None)) is not None:
        cast(Any, made).generation_config = copy.deepcopy(settings)
    return made.train(model.training)


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same parts, that may be given others."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
