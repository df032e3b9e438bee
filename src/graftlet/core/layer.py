# SPDX-License-Identifier: Apache-2.0
"""The one layer class: a base layer, the adapters on it, and which of them act.

Forward is a chain of stages. The first is the base layer; each acting adapter makes the next from the one before. A
stage can be called, and can tell its weight: merging writes the last stage's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import AdapterNameError, CallError, MergeError, MergeWarning, listing, nearest, warn
from ..weights.site import Site, Weighted
from .context import BASE, Call, current
from .method import Method, Spec, Stage, View, Weights
from .tensors import Box, Common, Leaf, as_held, attribute, split


@dataclass
class Branch:
    """One adapter on one layer, made apart from the layer and then attached to it."""

    method: Method
    config: PeftConfig
    key: str
    settings: dict[str, Any]
    specs: dict[str, Spec]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rebased: Tensor | None = None
    """A new base weight `[out, in, *kernel]` that the initialisation asks for."""


class AdapterHost(Weighted):
    """A module that stands in for another and carries adapters: which are there, which are active, which are merged."""

    def __init__(self) -> None:
        super().__init__()
        self._active: list[str] = []
        self._disabled = False
        self.merged_adapters: list[str] = []

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters held here."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The module that is stood in for."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    def acting(self) -> list[str]:
        """The adapters that a forward applies now, in order: active, held here, and not in the weight already."""
        if self._disabled:
            return []
        return [n for n in self._active if n in self.adapters and n not in self.merged_adapters]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; they alone can be trained, and not in inference mode."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.merged and names != self._active:
            warn(
                MergeWarning,
                f"adapters {listing(self.merged_adapters)} were merged; unmerged to activate {listing(names)}.",
            )
            self.unmerge()
        self._active = names
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters act, or let the base layer act alone."""
        if not enabled and self.merged:
            self.unmerge()
        self._disabled = not enabled
        for name in self._active if enabled else self.adapters:
            self.set_requires_grad(name, enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was active, another one held here becomes so."""
        if adapter_name not in self.adapters:
            return
        if adapter_name in self.merged_adapters:
            raise MergeError(f"adapter {adapter_name!r} is merged; unmerge before deleting it.")
        self.forget(adapter_name)
        if adapter_name in self._active:
            left = [n for n in self._active if n != adapter_name] or self.adapters[:1]
            self.set_adapter(left)

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Of the adapters asked for (the active ones unless named), those held here and not merged yet."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self.adapters and n not in self.merged_adapters]

    # what a kind of host gives

    def forget(self, name: str) -> None:
        raise NotImplementedError

    def set_requires_grad(self, name: str, requires_grad: bool) -> None:
        for parameter in self.trainable(name).values():
            parameter.requires_grad_(requires_grad)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that an adapter trains here, by their key in the file."""
        raise NotImplementedError

    def state(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors that go to the file, by their key below this module."""
        raise NotImplementedError

    def assign(self, name: str, key: str, value: Tensor) -> None:
        """Put a tensor of the file into its place, in the place's dtype and on the layer's device."""
        raise NotImplementedError

    def part(self, shared: set[int]) -> None:
        """Stop sharing a weight (one of these tensors, by id) with other layers, before it is written."""

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        """The innermost module stood in for."""
        inner = self.base
        return inner.get_base_layer() if isinstance(inner, AdapterHost) else inner


class Base:
    """The first stage: the layer without adapters, or with those that are merged into its weight."""

    def __init__(self, layer: AdaptedLayer, args: tuple = (), kwargs: dict | None = None, pure: bool = False) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs or {}
        self.pure = pure and layer.merged
        self.dtype: torch.dtype | None = None
        self._weights: Weights | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.pure:
            W, b = self.layer.original()
            y = self.layer.site.op(x, W, b, *self.args, **self.kwargs)
        else:
            y = self.layer.base_layer(x, *self.args, **self.kwargs)
        self.dtype = y.dtype
        return y

    def weight(self) -> Weights:
        if self._weights is None:
            self._weights = widened(*(self.layer.original() if self.pure else self.layer.site.read()))
        return self._weights

    def origin(self) -> Weights:
        return self.weight() if self.pure or not self.layer.merged else widened(*self.layer.original())


class Adapted:
    """A stage made by one adapter from the stage before."""

    def __init__(self, layer: AdaptedLayer, name: str, before: Stage) -> None:
        self.layer, self.name, self.before = layer, name, before

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer.methods[self.name].forward(self.layer.view(self.name), x, self.before)

    def weight(self) -> Weights:
        dtype = self.before.weight()[0].dtype
        return self.layer.methods[self.name].adapted(self.layer.view(self.name, dtype), self.before)

    def origin(self) -> Weights:
        return self.before.origin()


def widened(W: Tensor, b: Tensor | None) -> Weights:
    """Weights in at least single precision, so that deltas add up before anything is rounded."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.to(dtype), None if b is None else b.to(dtype)


class AdaptedLayer(AdapterHost):
    """A base layer with adapters on one of its weights.

    Tensors stand parameter-major (`self.lora_A["default"]`), settings likewise (`self.scaling["default"]`); a method
    sees them as one adapter's view. Attributes that are not ours are the base layer's.
    """

    def __init__(self, base_layer: nn.Module, site: Site) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.methods: dict[str, Method] = {}
        self.configs: dict[str, PeftConfig] = {}
        self.keys: dict[str, str] = {}
        self.specs: dict[str, dict[str, Spec]] = {}
        self.settings: dict[str, list[str]] = {}
        self.commons: dict[str, dict[str, Common]] = {}
        self._saved: tuple[Any, Any] | None = None
        self._shared: list[nn.Parameter] = []  # the tied weight, while a merged copy of it stands in its place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if "base_layer" not in modules:
                raise
            masks = self.__dict__["site"].masks
            return masks[name] if name in masks else getattr(modules["base_layer"], name)

    @property
    def adapters(self) -> list[str]:
        return list(self.methods)

    @property
    def base(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as kept (with what is merged into it)."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base_layer.bias)

    # adapters come and go

    def attach(self, name: str, branch: Branch) -> None:
        """Take an adapter in."""
        for tensor_name, spec in branch.specs.items():
            self.put(name, tensor_name, branch.tensors[tensor_name], spec)
        for key, value in branch.settings.items():
            if isinstance(value, nn.Module):
                self._box(key).put(name, value)
            else:
                self.__dict__.setdefault(key, {})[name] = value
        self.methods[name], self.configs[name], self.keys[name] = branch.method, branch.config, branch.key
        self.specs[name], self.settings[name] = branch.specs, list(branch.settings)

    def put(self, adapter: str, tensor_name: str, tensor: Tensor, spec: Spec) -> None:
        """Hold one tensor of an adapter in its box."""
        box, entry = split(tensor_name)
        if entry is None:
            self._box(box).put(adapter, tensor, spec.persistent)
            return
        if adapter not in self._box(box):
            self._box(box).put(adapter, Leaf())
        leaf = self._box(box)[adapter]
        if isinstance(tensor, nn.Parameter):
            leaf.register_parameter(entry, tensor)
        else:
            leaf.register_buffer(entry, tensor, persistent=spec.persistent)

    def _box(self, name: str) -> Box:
        if name not in self._modules:
            self._modules[name] = Box()  # not add_module, which would find the base layer's attributes taken
        return cast(Box, self._modules[name])

    def forget(self, name: str) -> None:
        for tensor_name in self.specs.pop(name):
            self._drop(split(tensor_name)[0], name)
        for key in self.settings.pop(name):
            self._drop(key, name)
        for held in (self.methods, self.configs, self.keys, self.commons):
            held.pop(name, None)

    def _drop(self, attribute_name: str, name: str) -> None:
        box = self._modules.get(attribute_name)
        if isinstance(box, Box):
            box.drop(name)
        else:
            self.__dict__[attribute_name].pop(name, None)

    def tensor(self, adapter: str, tensor_name: str) -> Tensor:
        """One tensor of an adapter, by its name in memory."""
        box, entry = split(tensor_name)
        held = cast(Box, self._modules[box])[adapter]
        return held if entry is None else getattr(held, entry)

    def view(self, name: str, dtype: torch.dtype | None = None) -> View:
        """What a method sees of one adapter; its floating tensors in `dtype` where that is given."""
        values: dict[str, Any] = {"key": self.keys[name], "training": self.training}
        for key in self.settings[name]:
            values[key] = getattr(self, key)[name]
        kept = torch.float32
        for tensor_name, spec in self.specs[name].items():
            tensor = self.tensor(name, tensor_name)
            if tensor.is_floating_point():
                kept = tensor.dtype if spec.dtype is None else kept
                tensor = tensor if dtype is None else tensor.to(dtype)
            values[attribute(tensor_name)] = tensor
        for common_name, box in self.commons.get(name, {}).items():
            values[common_name] = box[name] if dtype is None else box[name].to(dtype)
        return View(self.configs[name], self.site, dtype or kept, values)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        specs = {n: s for n, s in self.specs[name].items() if s.trainable}
        return {s.disk or n: cast(nn.Parameter, self.tensor(name, n)) for n, s in specs.items()}

    def state(self, name: str) -> dict[str, Tensor]:
        return {s.disk or n: self.tensor(name, n) for n, s in self.specs.get(name, {}).items() if s.saved}

    def assign(self, name: str, key: str, value: Tensor) -> None:
        for tensor_name, spec in self.specs[name].items():
            if (spec.disk or tensor_name) == key:
                held = self.tensor(name, tensor_name)
                if held.is_meta:
                    made = as_held(value.to(self.site.weight.device, held.dtype, copy=True), spec)
                    self.put(name, tensor_name, made.requires_grad_(held.requires_grad), spec)
                else:
                    held.copy_(value)

    # forward

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is not None and call.rows is not None and not self._disabled:
            return self._mixed(call, x, args, kwargs)
        names = self.acting()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self._run(names, x, args, kwargs)

    def _run(self, names: list[str], x: Any, args: tuple, kwargs: dict, pure: bool = False) -> Any:
        base = Base(self, args, kwargs, pure)
        stage = self._stages(names, base)
        if self.site.opaque:
            W, b = stage.weight()
            kept = self.site.weight.dtype
            return self.site.op(x, W.to(kept), b if b is None else b.to(kept), *args, **kwargs)
        y = stage(x)
        return y.to(base.dtype or (x.dtype if x.is_floating_point() else self.site.weight.dtype))

    def _stages(self, names: list[str], stage: Stage) -> Stage:
        for name in names:
            stage = Adapted(self, name, stage)
        return stage

    def _mixed(self, call: Call, x: Any, args: tuple, kwargs: dict) -> Any:
        """Each row as if its adapter alone were active, whatever is active or merged."""
        groups = call.groups(self.site.rows(x), x.device)
        if groups is None:
            raise CallError(
                f"adapter_names has {len(call.rows or ())} rows, but a {type(self.site.module).__name__} was called "
                f"with an input of shape {tuple(x.shape)}, whose rows are not the batch's; this layer cannot be mixed."
            )
        parts = []
        for name, index in groups:
            names = [name] if name != BASE and name in self.methods else []
            parts.append((index, self._run(names, self.site.select(x, index), args, kwargs, pure=True)))
        return self.site.gather(parts)

    def effective(self) -> Weights:
        """Weight and bias as adapted now, in the layer's own layout and dtype."""
        W, b = self._stages(self.acting(), Base(self)).weight()
        kept = self.site.weight.dtype
        return self.site.kept(W).to(kept), None if b is None else b.to(kept)

    # merging

    def original(self) -> Weights:
        """Weight and bias before anything was merged into them."""
        return self.site.read() if self._saved is None else self.site.original(self._saved)

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Weights:
        """Weight and bias with these adapters on the original ones, in at least single precision."""
        return self._stages(names, Base(self, pure=True)).weight()

    @torch.no_grad()
    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight into the base layer, after checking that it is finite and fits.

        Raises `MergeError`, the weight untouched, where it does not. Several adapters add up at the original weight,
        however they are merged one after another.
        """
        names = self.to_merge(adapter_names)
        for name in names:
            if self.methods[name].unmergeable:
                raise MergeError(f"adapter {name!r} cannot be merged: {self.methods[name].unmergeable}.")
        if not names:
            return
        W, b = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not (W.isfinite().all() and (b is None or b.isfinite().all())):
            raise MergeError(f"merging {listing(names)} would write NaN or Inf into the weights; nothing was changed.")
        self.site.accepts(W)
        if self._saved is None:
            self._saved = self.site.save()
        self.site.write(W, b)
        self.merged_adapters += names

    def part(self, shared: set[int]) -> None:
        kept = self.site.weight
        if id(kept) in shared and isinstance(kept, nn.Parameter) and not self._shared:
            self._shared.append(kept)
            setattr(self.site.module, self.site.name, nn.Parameter(kept.detach().clone(), requires_grad=False))

    def unmerge(self) -> None:
        """Bring back the bits that were there before the first merge."""
        if self._saved is not None:
            self.site.restore(self._saved)
        if self._shared:
            setattr(self.site.module, self.site.name, self._shared.pop())
        self._saved, self.merged_adapters = None, []


def hosts(model: nn.Module) -> Iterator[tuple[str, AdapterHost]]:
    """Every wrapper of a model with its path, outermost first."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, AdapterHost))


def commons(model: nn.Module) -> Iterator[tuple[str, Common]]:
    """Every tensor box that layers share, with its path."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Common))


def relink(model: nn.Module, adapter: str) -> None:
    """Share again what an adapter's layers share, after its tensors were loaded one by one."""
    layers = {h.keys[adapter]: h for _, h in hosts(model) if isinstance(h, AdaptedLayer) and adapter in h.methods}
    for method in {type(h.methods[adapter]): h.methods[adapter] for h in layers.values()}.values():
        method.link(layers, adapter)


def check_name(name: object, taken: list[str]) -> str:
    """An adapter name that can be a key and a folder, and is free; `AdapterNameError` with the nearest usable one."""
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"adapter name {name!r}: a non-empty string is needed.")
    bad = sorted({c for c in name if c in './\\:*?"<>|' or ord(c) < 32})
    if bad or len(name) > 100:
        usable = "".join("_" if c in bad else c for c in name)[:100].strip("_ ") or "default"
        why = f"has {listing(map(repr, bad))}" if bad else "is longer than 100 characters"
        raise AdapterNameError(
            f"adapter name {name[:120]!r} {why} and could not be a folder and a key; use {usable!r}."
        )
    if name == BASE:
        raise AdapterNameError(f"adapter name {BASE!r} stands for the base model in adapter_names; choose another.")
    if name in taken:
        raise AdapterNameError(f"adapter {name!r} exists already; delete it first, or choose another name.")
    return name


def check_known(names: list[str], known: list[str]) -> None:
    """Raise `AdapterNameError` where a name is none of `known`."""
    for name in names:
        if name not in known:
            raise AdapterNameError(
                f"no adapter {name!r}{nearest(str(name), known)} Present: {listing(known) or 'none'}."
            )
