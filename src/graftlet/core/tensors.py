# SPDX-License-Identifier: Apache-2.0
"""Where a layer keeps its adapters' tensors: one box a tensor name, one entry an adapter, any adapter name.

`layer.lora_A["default"].weight` and `layer.hada_w1_a["default"]` give the reference's keys in `state_dict()`:
`lora_A.default.weight`, `hada_w1_a.default`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterFileError
from .method import Holder, Spec


class Box(nn.Module):
    """A mapping from adapter names to tensors or modules.

    torch's own dictionaries refuse names that are also attributes (`keys`, `forward`); an adapter may have any name.
    """

    def __getitem__(self, name: str) -> Any:
        if name in self._parameters:
            return self._parameters[name]
        return self._modules[name] if name in self._modules else self._buffers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters or name in self._modules or name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter([*self._parameters, *self._modules, *self._buffers])

    def __len__(self) -> int:
        return len(self._parameters) + len(self._modules) + len(self._buffers)

    def keys(self) -> list[str]:
        return list(self)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self[name]) for name in self]

    def values(self) -> list[Any]:
        return [self[name] for name in self]

    def train(self, mode: bool = True) -> Box:
        """As for any module, but for an adapter that is called `training`."""
        self.__dict__["training"] = mode
        for module in self._modules.values():
            if module is not None:
                module.train(mode)
        return self

    def put(self, name: str, value: Tensor | nn.Module, persistent: bool = True) -> None:
        """Hold a parameter, a module, or a tensor as a buffer under `name`."""
        self.drop(name)
        if isinstance(value, nn.Module):
            self._modules[name] = value
        elif isinstance(value, nn.Parameter):
            self._parameters[name] = value
        else:
            self._buffers[name] = value
            if not persistent:
                self._non_persistent_buffers_set.add(name)

    def rename(self, old: str, new: str) -> None:
        """Hold under `new` what is held under `old`, at the same place among the others."""
        for held in (self._parameters, self._modules, self._buffers):
            renamed(held, old, new)
        if old in self._non_persistent_buffers_set:
            self._non_persistent_buffers_set.remove(old)
            self._non_persistent_buffers_set.add(new)
        if isinstance(mirror := self._modules.get(new), Mirror):
            mirror.adapter = new

    def drop(self, name: str) -> None:
        """Forget `name`, if it is held."""
        for held in (self._parameters, self._modules, self._buffers):
            held.pop(name, None)
        self._non_persistent_buffers_set.discard(name)


class Boxes(nn.Module):
    """A module that keeps tensors in boxes, one a tensor name, by adapter."""

    def put(self, adapter: str, tensor_name: str, tensor: Tensor, spec: Spec) -> None:
        """Hold one tensor of an adapter in its box."""
        box_name, entry = split(tensor_name)
        box = self._box(box_name)
        if entry is None:
            box.put(adapter, tensor, spec.persistent)
            return
        if adapter not in box:
            box.put(adapter, Leaf())
        box[adapter].put(entry, tensor, spec.persistent)

    def tensor(self, adapter: str, tensor_name: str) -> Tensor:
        """One tensor of an adapter, by its name in memory."""
        box, entry = split(tensor_name)
        held = cast(Box, self._modules[box])[adapter]
        return held if entry is None else held[entry]

    def _box(self, name: str) -> Box:
        if name not in self._modules:
            self._modules[name] = Box()  # not add_module, which would find the base layer's attributes taken
        return cast(Box, self._modules[name])


class Common(Box):
    """A tensor that all layers of an adapter share, held once at the root of the model: `vera_A.default`.

    Several of one name stand in a leaf, by entry: `tinylora_v.default.0`. The entry of one alone is "".
    """

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, dict[str, Spec]] = {}

    def attach(self, adapter: str, entry: str, tensor: Tensor, spec: Spec) -> None:
        """Hold an adapter's tensor."""
        self.specs.setdefault(adapter, {})[entry] = spec
        if not entry:
            self.put(adapter, tensor, spec.persistent)
            return
        if adapter not in self:
            self.put(adapter, Leaf())
        self[adapter].put(entry, tensor, spec.persistent)

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        renamed(self.specs, old, new)

    def forget(self, adapter: str) -> None:
        self.drop(adapter)
        self.specs.pop(adapter, None)

    def tensor(self, adapter: str, entry: str) -> Tensor:
        """One tensor of an adapter."""
        return self[adapter][entry] if entry else self[adapter]

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """All tensors of an adapter, by entry."""
        return {entry: self.tensor(adapter, entry) for entry in self.specs.get(adapter, ())}

    def assign(self, adapter: str, key: str, value: Tensor) -> None:
        """Fill an adapter's tensor from the file, in its own dtype and place."""
        held, spec = self.tensor(adapter, key), self.specs[adapter][key]
        if held.is_meta:
            made = as_held(value.to(dtype=held.dtype, copy=True), spec)
            self.attach(adapter, key, made.requires_grad_(held.requires_grad), spec)
        else:
            held.copy_(value)

    def set_requires_grad(self, adapter: str, requires_grad: bool) -> None:
        for entry, tensor in self.tensors(adapter).items():
            if isinstance(tensor, nn.Parameter) and self.specs[adapter][entry].trainable:
                tensor.requires_grad_(requires_grad)


class Networks(Common):
    """Modules of one name, one an adapter, beside the model: `shadow_backbone.default.norm.weight`.

    In the file the adapter's level is always `default`.
    """

    def hold(self, adapter: str, network: nn.Module) -> None:
        """Hold an adapter's module; what is frozen in it stays so."""
        self.put(adapter, network)
        held = network.state_dict(keep_vars=True)
        self.specs[adapter] = {f"{FIRST}{n}": Spec(tuple(t.shape), t.requires_grad) for n, t in held.items()}

    def tensor(self, adapter: str, entry: str) -> Tensor:
        path, _, last = entry.removeprefix(FIRST).rpartition(".")
        return getattr(cast(nn.Module, self[adapter]).get_submodule(path), last)


FIRST = "default."


class Groups(nn.Module):
    """Tensors of one name, each shared by the layers of a group: `frod_V.self_attn_q_proj.default`."""


def common_of(root: nn.Module, name: str, group: str = "") -> Common:
    """The box of a shared tensor at the root of a model, made where there is none."""
    if group:
        if not isinstance(root._modules.get(name), Groups):
            root.add_module(name, Groups())
        root, name = cast(nn.Module, root._modules[name]), group
    if not isinstance(root._modules.get(name), Common):
        root.add_module(name, Common())
    return cast(Common, root._modules[name])


class Leaf(nn.Module):
    """A module of its own for one tensor, as `lora_A.default` is: callable as the linear map it would be.

    An entry `0.weight` is the weight of a leaf `0` within.
    """

    weight: Tensor
    bias: Tensor | None

    def __getitem__(self, entry: str) -> Tensor:
        inner, _, rest = entry.partition(".")
        if rest:
            return self._modules[inner][rest]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        if self._parameters.get(entry) is None:
            return self._buffers[entry]  # pyright: ignore[reportReturnType]
        return self._parameters[entry]  # pyright: ignore[reportReturnType]  # so asked for, ZeRO-3 gathers it

    def put(self, entry: str, tensor: Tensor, persistent: bool) -> None:
        """Hold a parameter, or a tensor as a buffer."""
        inner, _, rest = entry.partition(".")
        if rest:
            if inner not in self._modules:
                self.add_module(inner, Leaf())
            cast(Leaf, self._modules[inner]).put(rest, tensor, persistent)
        elif isinstance(tensor, nn.Parameter):
            self.register_parameter(entry, tensor)
        else:
            self.register_buffer(entry, tensor, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self["bias"] if "bias" in self._parameters else None)


class Mirror(Leaf):
    """A leaf whose weight is another layer's tensor, transposed: it has a key of its own, but no memory.

    An output head that shares an embedding's weight is adapted by the embedding's factors, the other way round.
    """

    def __init__(self, source: Holder, adapter: str, tensor_name: str) -> None:
        super().__init__()
        self.source = [source]  # in a list: no submodule
        self.adapter, self.tensor_name = adapter, tensor_name

    def __getattr__(self, name: str) -> Any:
        return self["weight"] if name == "weight" else super().__getattr__(name)

    def __getitem__(self, entry: str) -> Tensor:
        return self.source[0].tensor(self.adapter, self.tensor_name).T

    def put(self, entry: str, tensor: Tensor, persistent: bool) -> None:
        """Give the tensor to the layer that holds it."""
        held = self.source[0].tensor(self.adapter, self.tensor_name)
        made = nn.Parameter(tensor.detach().T.contiguous(), held.requires_grad)
        self.source[0].put(self.adapter, self.tensor_name, made, Spec(tuple(made.shape)))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self["weight"] if keep_vars else self["weight"].detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if f"{prefix}weight" not in state_dict:
            missing_keys.append(f"{prefix}weight")  # what is there, the other layer loads


def networks_of(root: nn.Module, name: str) -> Networks:
    """The box of networks of a name at the root of a model, made where there is none."""
    if not isinstance(root._modules.get(name), Networks):
        root.add_module(name, Networks())
    return cast(Networks, root._modules[name])


def share(source: Holder, layer: Holder, adapter: str, tensor_name: str) -> None:
    """Let a layer use the very tensor that another one holds."""
    tensor = source.tensor(adapter, tensor_name)
    if layer.tensor(adapter, tensor_name) is not tensor:
        layer.put(adapter, tensor_name, tensor, Spec(tuple(tensor.shape)))


def renamed(held: dict[str, Any], old: str, new: str) -> None:
    """Give an entry of a dictionary another key, in place, at its place in the order."""
    if old in held:
        items = [(new if key == old else key, value) for key, value in held.items()]
        held.clear()
        held.update(items)


def split(name: str) -> tuple[str, str | None]:
    """`lora_A.weight` is entry `weight` of a leaf in box `lora_A`; `hra_u` stands in its box itself."""
    box, _, entry = name.partition(".")
    return box, entry or None


def attribute(name: str) -> str:
    """How a view calls a tensor: `lora_A.weight` is `p.lora_A`, `lora_B.bias` is `p.lora_B_bias`."""
    return name.removesuffix(".weight").replace(".", "_")


def as_held(tensor: Tensor, spec: Spec) -> Tensor:
    """The tensor as what its spec says it is: a parameter, or a plain tensor for a buffer."""
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if spec.trainable else tensor


def adapter_dtype(dtype: torch.dtype, widen: bool) -> torch.dtype:
    """What an adapter is kept in on a layer that computes in `dtype`: the same, or at least single precision."""
    return torch.float32 if widen and dtype.itemsize < 4 else dtype


def check_places(places: Tensor, below: int, what: str) -> None:
    """Raise `AdapterFileError` where loaded indices are not all from 0 to `below` - 1."""
    if places.is_meta or not places.numel():
        return
    low, high = (int(end) for end in places.long().aminmax())
    if low < 0 or high >= below:
        raise AdapterFileError(f"{what} has places from {low} to {high}; there are those from 0 to {below - 1}.")
