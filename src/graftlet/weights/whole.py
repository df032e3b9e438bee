# SPDX-License-Identifier: Apache-2.0
"""Tensors that an engine keeps in parts, one a process: made whole, and filled from whole ones.

Two engines do so: torch's own (`DTensor`: FSDP2, tensor parallel), whose tensors know their parts, and DeepSpeed's ZeRO-3,
which leaves an empty parameter that can be gathered. Neither is imported: such tensors are known by what they can do.
Making one whole is a matter of all processes: each has to ask for the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError


def in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is kept in parts, of which this process has one; it may be whole for now."""
    return shared_out(tensor) or _partitioned(tensor)


def at_hand(tensor: Tensor, device: torch.device) -> bool:
    """Whether a parameter has its numbers here and now; FSDP2 gives one memory only as they come."""
    here = type(tensor) is nn.Parameter and tensor.device == device and not tensor.is_inference()
    return here and not tensor.is_meta and tensor.data_ptr() != 0


def shared_out(tensor: Tensor) -> bool:
    """Whether this process may compute with a part of a tensor: torch's own engines do so, ZeRO-3 never does."""
    return callable(getattr(tensor, "full_tensor", None))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, and the tensor itself where it is in no parts. All processes have to ask for it."""
    if shared_out(tensor):
        return tensor.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    if _partitioned(tensor):
        with _gathered(tensor):
            return tensor.detach().clone()
    return tensor


def in_use(tensor: Tensor) -> Tensor:
    """All of a tensor for a computation, which gives its gradient back to the parts where it learns."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return whole(tensor)
    if shared_out(tensor):  # each process computes the whole gradient
        from torch.distributed.tensor import Replicate

        sharded: Any = tensor
        return sharded.full_tensor(grad_placements=[Replicate()] * sharded.device_mesh.ndim)
    # while a model is called ZeRO-3 makes whole what is asked for by its module, and parts it after the backward
    return tensor if _partitioned(tensor) and tensor.numel() == shape_of(tensor).numel() else whole(tensor)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


@torch.no_grad()
def put(held: Tensor, value: Tensor) -> None:
    """Fill a tensor from a whole one; each process takes its own part of it, and sends nothing."""
    if _partitioned(held):
        with _gathered(held, changed=True):
            held.data.copy_(value)
    elif shared_out(held):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = held
        mesh, placements = sharded.device_mesh, sharded.placements
        place = value.detach().to(mesh.device_type, held.dtype)
        sharded.to_local().copy_(distribute_tensor(place, mesh, placements, src_data_rank=None).to_local())
    else:
        held.copy_(value)


def own_part(tensor: Tensor) -> Tensor:
    """A copy of what this process keeps of a tensor."""
    return getattr(tensor, "ds_tensor", tensor).detach().clone()


@torch.no_grad()
def put_part(held: Tensor, saved: Tensor) -> None:
    """Fill what this process keeps of a tensor from such a copy; all processes have to do so."""
    if _partitioned(held):
        known: Any = held
        with _gathered(known):
            known.ds_tensor.copy_(saved)
            known.partition(param_list=[known])
            known.all_gather(param_list=[known])
    else:
        held.detach().copy_(saved)


def whole_of(held: Tensor, saved: Tensor) -> Tensor:
    """All of a tensor as it was when its parts were copied."""
    if not _partitioned(held):
        return whole(saved)
    now = own_part(held)
    put_part(held, saved)
    try:
        return whole(held)
    finally:
        put_part(held, now)


@torch.no_grad()
def made_alike(tensors: Iterable[Tensor], model: nn.Module) -> None:
    """Give tensors that each process made the values that they have in the first of those that share a model out."""
    kept: Any = next(filter(in_parts, model.parameters()), None) if _among_others() else None
    if kept is None:
        return
    mesh = kept.device_mesh if shared_out(kept) else None
    groups = [kept.ds_process_group] if mesh is None else [mesh.get_group(axis) for axis in range(mesh.ndim)]
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
    places = list(_places(model, ids))
    with _left_alone([module for _, module, _, _, tensor in places if _partitioned(tensor)]):
        try:
            for name, _, held, key, tensor in places:
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


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let what ZeRO-3 keeps in parts be whole in a module until the block ends, so that it can be called without an engine."""
    with made_whole(module, {id(p) for p in module.parameters() if _partitioned(p)}):
        yield


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


@contextmanager
def _left_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules be called without ZeRO-3's hooks, which take every parameter for one of its own."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    hooks = [(module, name, getattr(module, name)) for module in dict.fromkeys(modules) for name in names]
    for module, name, _ in hooks:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, held in hooks:
            setattr(module, name, held)


def _places(model: nn.Module, ids: Set[int]) -> Iterator[tuple[str, nn.Module, dict[str, Any], str, Tensor]]:
    """Everywhere that these tensors stand: their name, their module, its dictionary that holds them, and their key in it."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in list(held.items()):
                if tensor is not None and id(tensor) in ids:
                    yield clean(f"{path}.{key}" if path else key), module, held, key, tensor


def clean(name: str) -> str:
    """A tensor's name without the levels that compilers and checkpointing engines put into it."""
    for level in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(level, "")
    return name


def _among_others() -> bool:
    """Whether this process is one of several that know of each other."""
    found = sys.modules.get("torch.distributed")
    return found is not None and found.is_available() and found.is_initialized()


def _partitioned(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


@contextmanager
def _gathered(parameter: Any, changed: bool = False) -> Iterator[None]:
    """Let a parameter of ZeRO-3 be whole, in place, and then as it was: small ones stay whole, beside their parts."""
    stays = parameter.numel() == parameter.ds_numel
    parameter.all_gather(param_list=[parameter])
    try:
        yield
    finally:
        if changed or not stays:
            parameter.partition(param_list=[parameter], has_been_updated=changed)
        if changed and stays:
            parameter.all_gather(param_list=[parameter])
