# SPDX-License-Identifier: Apache-2.0
"""Tensors that an engine keeps in parts, one a process: made whole, and filled from whole ones.

Two engines do so: torch's own (`DTensor`: FSDP2, tensor parallel), whose tensors know their parts, and DeepSpeed's ZeRO-3,
which leaves an empty parameter that can be gathered. Neither is imported: such tensors are known by what they can do.
Making one whole is a matter of all processes: each has to ask for the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError


def in_parts(tensor: Tensor) -> bool:
    """Whether this process may hold but a part of a tensor."""
    return _sharded(tensor) or _partitioned(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, and the tensor itself where it is in no parts. All processes have to ask for it."""
    if _sharded(tensor):
        return tensor.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    if _partitioned(tensor):
        with _gathered(tensor):
            return tensor.detach().clone()
    return tensor


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


@torch.no_grad()
def put(held: Tensor, value: Tensor) -> None:
    """Fill a tensor from a whole one; each process takes its own part of it, and sends nothing."""
    if _partitioned(held):
        with _gathered(held, changed=True):
            held.data.copy_(value)
    elif _sharded(held):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = held
        mesh, placements = sharded.device_mesh, sharded.placements
        place = value.detach().to(mesh.device_type, held.dtype)
        sharded.to_local().copy_(distribute_tensor(place, mesh, placements, src_data_rank=None).to_local())
    else:
        held.copy_(value)


@torch.no_grad()
def made_alike(tensors: Iterable[Tensor], model: nn.Module) -> None:
    """Give tensors that each process made the values that they have in the first of those that share a model out."""
    sharded: Any = next(filter(_sharded, model.parameters()), None) if _among_others() else None
    if sharded is None:
        return
    groups = [sharded.device_mesh.get_group(axis) for axis in range(sharded.device_mesh.ndim)]
    for tensor in tensors:
        for group in groups if not tensor.is_meta else ():
            torch.distributed.broadcast(tensor.detach(), group=group, group_src=0)


def is_writer() -> bool:
    """Whether this process is the one that writes for all."""
    return not _among_others() or torch.distributed.get_rank() == 0


@contextmanager
def made_whole(
    model: nn.Module, ids: Set[int], given: Mapping[str, Tensor] | None = None, changed: bool = False
) -> Iterator[Mapping[int, Tensor]]:
    """Let those of a model's tensors that have these ids be whole until the block ends, in which the model is not called.

    Gives the whole ones by those ids. given: whole ones by the model's own keys, which are used in place of its own; then
    nothing is asked of other processes, and `AdapterFileError` raised where one is needed that is not there. changed: what
    they hold then, the parts take over.
    """
    swapped, known = list[tuple[dict[str, Any], str, Tensor]](), dict[int, Tensor]()
    try:
        for name, held, key, tensor in _places(model, ids):
            if id(tensor) not in known:
                known[id(tensor)] = _found(name, tensor, given)
            if known[id(tensor)] is not tensor:
                swapped.append((held, key, tensor))
                held[key] = known[id(tensor)]
        yield known
        for held, key, tensor in swapped if changed else ():
            put(tensor, held[key])
    finally:
        for held, key, tensor in swapped:
            held[key] = tensor


def _found(name: str, tensor: Tensor, given: Mapping[str, Tensor] | None) -> Tensor:
    if given is not None and name not in given and in_parts(tensor):
        raise AdapterFileError(
            f"state_dict has no {name!r}, of which this process holds but a part. Leave state_dict out and call this on "
            "all processes: the adapter's tensors are gathered, and no others."
        )
    found = whole(tensor) if given is None else given.get(name, tensor)
    if found is tensor or not isinstance(tensor, nn.Parameter):
        return found
    return nn.Parameter(found.detach(), tensor.requires_grad)


def _places(model: nn.Module, ids: Set[int]) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Everywhere that these tensors stand: their name, the dictionary that holds them, and their key in it."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in list(held.items()):
                if tensor is not None and id(tensor) in ids:
                    yield clean(f"{path}.{key}" if path else key), held, key, tensor


def clean(name: str) -> str:
    """A tensor's name without the levels that compilers and checkpointing engines put into it."""
    for level in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(level, "")
    return name


def _among_others() -> bool:
    """Whether this process is one of several that know of each other."""
    found = sys.modules.get("torch.distributed")
    return found is not None and found.is_available() and found.is_initialized()


def _sharded(tensor: Tensor) -> bool:
    return callable(getattr(tensor, "full_tensor", None))


def _partitioned(tensor: Tensor) -> bool:
    return tensor.numel() != shape_of(tensor).numel()


@contextmanager
def _gathered(parameter: Any, changed: bool = False) -> Iterator[None]:
    """Let a parameter of ZeRO-3 be whole, in place."""
    parameter.all_gather(param_list=[parameter])
    try:
        yield
    finally:
        parameter.partition(param_list=[parameter], has_been_updated=changed)
