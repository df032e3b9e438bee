# SPDX-License-Identifier: Apache-2.0
"""The base's tensors by the keys that they had before there was an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.host import bare
from ..core.target import below
from ..core.tensors import Box
from ..errors import AdapterFileError, listing


class IncompatibleKeys(NamedTuple):
    """What was not given, and what there is no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict of a `PeftModel`'s base, as if it had no adapters; where some are merged, with them."""
    return {key: tensor.detach() for key, tensor in _tensors(model.get_base_model())}


@torch.no_grad()
def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> IncompatibleKeys:
    """Put tensors into a `PeftModel`'s base, by the keys of the plain model.

    Raises:
        AdapterFileError: with `strict`, keys that are missing or unknown; in any case, a tensor of another shape. Nothing
            was changed.
    """
    places = dict(_tensors(model.get_base_model()))
    keys = IncompatibleKeys([k for k in places if k not in state_dict], [k for k in state_dict if k not in places])
    if strict and any(keys):
        told = [
            f"{what}: {listing(found, 4)}" for what, found in zip(("missing", "unknown"), keys, strict=True) if found
        ]
        raise AdapterFileError(
            f"this is not the state of the base model; {'; '.join(told)}. strict=False takes the rest."
        )
    given = {k: t for k, t in state_dict.items() if k in places}
    for key, tensor in given.items():
        if tensor.shape != places[key].shape:
            raise AdapterFileError(f"{key} has shape {tuple(tensor.shape)}; the base has {tuple(places[key].shape)}.")
    for key, tensor in given.items():
        places[key].copy_(tensor)
    return keys


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's state dict, wrappers passed over."""
    module = bare(module)
    kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in {**module._parameters, **kept}.items():
        if tensor is not None:
            yield below(prefix, name), tensor
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Box):
            yield from _tensors(child, below(prefix, name))
