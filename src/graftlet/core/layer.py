# SPDX-License-Identifier: Apache-2.0
"""The one layer class: a base layer, the adapters on it, and which of them act.

Forward is a chain of stages. The first is the base layer; each acting adapter makes the next from the one before. A
stage can be called, and can tell its weight: merging writes the last stage's weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import CallError, MergeError, listing
from ..weights.offloaded import present
from ..weights.rounding import finite, note
from ..weights.site import Site
from ..weights.storage import MARKS, PLAIN
from ..weights.whole import in_parts
from .apart import Apart, SharedOut
from .context import BASE, Call, current, using
from .merging import Kept, exactly, write
from .method import Delta, Method, Spec, Stage, View, Weights
from .scales import Scales
from .stages import Adapted, Base, Rows, widened
from .tensors import Box, Boxes, Common, Leaf, Mirror, as_held, attribute, renamed, split
from .together import Peers, Together


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


class AdaptedLayer(SharedOut, Together, Scales, Boxes):
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
        self._reads: dict[str, list[tuple[str, str, str | None, Spec]]] = {}
        self._trained: dict[str, list[tuple[str, list[str], str]]] = {}  # where what learns stands: box, modules, name
        self.commons: dict[str, dict[str, Common]] = {}
        self._peers = Peers(self)
        self.kept: Kept | None = None  # what brings the base's weight back from what is merged into it
        self._leaders: dict[str, list[AdaptedLayer]] = {}
        self.rebased: set[str] = set()  # adapters that took a part of the base weight out of it as they started
        self.cast_input_dtype_enabled = True
        self.apart = Apart.of(site)
        self._shared: list[nn.Parameter] = []  # the tied weight, while a merged copy of it stands in its place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if "base_layer" not in modules or name in MARKS:
                raise
            masks = self.__dict__["site"].masks
            return masks[name] if name in masks else getattr(modules["base_layer"], name)

    @property
    def adapters(self) -> list[str]:
        return list(self.methods)

    def holds(self, name: str) -> bool:
        return name in self.methods

    @property
    def base(self) -> nn.Module:
        return cast(nn.Module, self._modules["base_layer"])  # asked for often: attributes of modules are slow

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
        self._unsettle()
        self._read(name)
        self._learning.add(name)
        self.note_scale(name, branch.settings)

    def _read(self, name: str) -> None:
        """Note where an adapter's tensors stand, which is asked for in every call."""
        specs = self.specs[name]
        self._reads[name] = [(attribute(n), *split(n), spec) for n, spec in specs.items()]
        paths = [(split(n)[0], [name, *n.split(".")[1:]]) for n, spec in specs.items() if spec.trainable]
        self._trained[name] = [(box, path[:-1], path[-1]) for box, path in paths]

    def mirror(self, adapter: str, tensor_name: str, source: AdaptedLayer, source_name: str) -> None:
        """Let an adapter's tensor be the transpose of another layer's from now on."""
        self._box(split(tensor_name)[0]).put(adapter, Mirror(source, adapter, source_name))
        self._leaders[adapter] = [source]
        for setting in self.settings[adapter]:
            if setting in self.__dict__:
                self.__dict__[setting][adapter] = source.__dict__[setting][adapter]

    def forget(self, name: str) -> None:
        self._unsettle()
        for tensor_name in self.specs.pop(name):
            self._drop(split(tensor_name)[0], name)
        for key in self.settings.pop(name):
            self._drop(key, name)
        for held in (self.methods, self.configs, self.keys, self.commons, self._reads, self._trained, self._leaders):
            held.pop(name, None)
        self._learning.discard(name)
        self.rebased.discard(name)
        self.__dict__.get("first_scaling", {}).pop(name, None)

    def _drop(self, attribute_name: str, name: str) -> None:
        box = self._modules.get(attribute_name)
        if isinstance(box, Box):
            box.drop(name)
        else:
            self.__dict__[attribute_name].pop(name, None)

    def setting(self, adapter: str, name: str) -> Any:
        """One setting of an adapter here."""
        return (self.__dict__[name] if name in self.__dict__ else cast(Box, self._modules[name]))[adapter]

    def shapes(self, adapter: str, p: View) -> dict[str, tuple[int, ...]]:
        """The shapes that an adapter's tensors have here, by its settings in a view."""
        method, stack = self.methods[adapter], self.site.stack
        specs = method.params(self.site, p)
        return {n: method.stacked(n, s, stack) if stack else s.shape for n, s in specs.items()}

    def view(self, name: str, dtype: torch.dtype | None = None) -> View:
        """What a method sees of one adapter; its floating tensors in `dtype` where that is given."""
        values: dict[str, Any] = {"key": self.keys[name], "training": self.training}
        boxes: dict[str, Any] = self._modules
        for key in self.settings[name]:
            values[key] = (self.__dict__[key] if key in self.__dict__ else boxes[key])[name]
        kept = torch.float32
        for called, box, entry, spec in self._reads[name]:
            held = boxes[box][name]
            tensor = held if entry is None else held[entry]
            if tensor.is_meta:
                tensor = present(boxes[box], name, tensor) if entry is None else present(held, entry, tensor)
            if tensor.is_floating_point():
                kept = tensor.dtype if spec.dtype is None else kept
                tensor = tensor if dtype is None else tensor.to(dtype)
            values[called] = tensor
        shared = self.commons.get(name, {})
        for called, common in shared.items():
            held = common[name]
            if isinstance(held, Tensor) and held.is_meta:
                held = present(common, name, held)
            whole = dtype is None or isinstance(held, Leaf) or not held.is_floating_point()
            values[called] = held if whole else held.to(dtype)
        values["shared"], values["adapter"], values["peers"] = tuple(shared), name, self._peers
        if not self.cast_input_dtype_enabled:
            values["casts"] = False
        return View(self.configs[name], self.site, dtype or kept, values)

    def check_together(self, names: list[str]) -> None:
        here = [n for n in names if n in self.methods]
        views = {n: self.view(n) for n in here} if len(here) > 1 else {}
        for name, own in views.items():
            self.methods[name].join(own, [other for other in views.values() if other is not own])

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        for box in self._modules.values():
            if isinstance(box, Box):
                box.rename(old, new)
        named = [
            self.methods,
            self.configs,
            self.keys,
            self.specs,
            self.settings,
            self._reads,
            self._trained,
            self.commons,
        ]
        for held in [
            *named,
            self._leaders,
            *(self.__dict__[s] for s in self.settings.get(old, ()) if s in self.__dict__),
        ]:
            renamed(held, old, new)
        if new in self.specs:
            self._read(new)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        own: dict[str, Any] = self.__dict__  # asked for once: attributes of modules are slow
        found, boxes = [], own["_modules"]
        for box, above, last in own["_trained"][name]:
            held = boxes[box]
            for step in above:
                held = held._modules[step]
            if (parameter := held._parameters.get(last)) is not None:
                found.append(parameter)
        return found

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        held = {s.disk or n: self.tensor(name, n) for n, s in self.specs.get(name, {}).items() if s.trainable}
        return {key: tensor for key, tensor in held.items() if isinstance(tensor, nn.Parameter)}

    def state(self, name: str) -> dict[str, Tensor]:
        return {s.disk or n: self.tensor(name, n) for n, s in self.specs.get(name, {}).items() if s.saved}

    def pack(self, name: str) -> dict[str, Tensor]:
        return self.methods[name].pack(self.view(name), self.state(name)) if name in self.methods else {}

    def unpack(self, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        method = self.methods.get(name)
        if method is None or type(method).unpack is Method.unpack:  # which needs no view
            return given
        return method.unpack(self.view(name), given)

    def assign(self, name: str, key: str, value: Tensor) -> None:
        for tensor_name, spec in self.specs[name].items():
            if (spec.disk or tensor_name) == key:
                held = self.tensor(name, tensor_name)
                if held.is_meta:
                    made = as_held(value.to(self.site.device, held.dtype, copy=True), spec)
                    self.put(name, tensor_name, made.requires_grad_(held.requires_grad), spec)
                else:
                    held.copy_(value)

    def check_loaded(self, name: str) -> None:
        method = self.methods.get(name)
        if method is not None and type(method).check_loaded is not Method.check_loaded:
            method.check_loaded(self.view(name))

    # forward

    def idle(self, call: Call | None) -> bool:
        return not self.merged and (self.off(call) or ((call is None or call.rows is None) and not self.acting(call)))

    def run(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is not None and call.rows is not None and not self.off(call):
            return self._mixed(call, x, args, kwargs)
        names, pure = self.acting(call), self.pure(call)
        if not names and not (pure and self.merged):
            return self.call_base(x, *args, **kwargs)
        return self._run(names, x, args, kwargs, pure)

    def _run(self, names: list[str], x: Any, args: tuple, kwargs: dict, pure: bool) -> Any:
        plain = len(args) == len(kwargs) == len(self.merged_adapters) == 0 and self.apart is None
        if plain and len(names) == 1 and (y := self._by_itself(names[0], x)) is not None:
            return y
        return self._staged(names, x, Base(self, args, kwargs, pure=pure))

    def _staged(self, names: list[str], x: Any, base: Base) -> Any:
        stage, args, kwargs = self._stages(names, base), base.args, base.kwargs
        if self.site.opaque:
            if not names and not base.pure:
                return self.base_layer(x, *args, **kwargs)
            W, b = stage.weight()
            kept = self.site.dtype
            return self.site.op(x, W.to(kept), b if b is None else b.to(kept), *args, **kwargs)
        y = stage(x)
        return y.to(base.dtype or (x.dtype if x.is_floating_point() else self.site.dtype))

    def _first_stage(self) -> Base:
        return Base(self)

    def _stages(self, names: list[str], stage: Stage) -> Stage:
        for name in names:
            stage = Adapted(self, name, stage)
        return stage

    def _mixed(self, call: Call, x: Any, args: tuple, kwargs: dict) -> Any:
        """Each row as if its adapter alone were active, whatever is active or merged."""
        count = self.site.rows(x)
        groups = call.groups(count, x.device, exact=x.dim() == 2 and x.is_floating_point())
        if groups is None:
            raise CallError(
                f"adapter_names has {len(call.rows or ())} rows, but a {type(self.site.module).__name__} was called "
                f"with an input of shape {tuple(x.shape)}, whose rows are not the batch's; this layer cannot be mixed."
            )
        whole, parts = Base(self, args, kwargs, pure=True), []
        if count is not None and (y := self._together(call, x, whole)) is not None:
            return y
        for name, index in groups:
            if len(groups) > 1 and name in self.methods and (why := self.methods[name].unmixable):
                raise CallError(f"adapter {name!r} cannot serve a part of a batch: {why}.")
            names = [name] if name != BASE and name in self.methods else []
            with using(call.part(name, index, index.numel() if count is None else count)):
                if len(groups) == 1:
                    return self._run(names, x, args, kwargs, True)
                rows = self.site.select(x, index)
                parts.append((index, self._staged(names, rows, Rows(whole, x, index, rows))))
        return self.site.gather(parts)

    def effective(self) -> Weights:
        """Weight and bias as adapted now, in the layer's own layout and dtype."""
        call = current()
        alone = call.alone if call is not None else None
        names = self.acting(call) if alone is None else [alone] if alone in self.methods else []
        W, b = self._stages(names, Base(self, pure=self.pure(call) or alone is not None)).weight()
        kept = self.site.dtype
        return self.site.kept(W).to(kept), None if b is None else b.to(kept)

    # merging

    def original(self) -> Weights:
        """Weight and bias before anything was merged into them."""
        return self.site.read() if self.kept is None else self.kept.original(self.site)

    @torch.no_grad()
    def change(self, name: str) -> Weights:
        """What an adapter alone adds to the original weight and bias, in at least single precision.

        A `Delta` gives its own, not the difference of two rounded weights. The bias is None where it stays as it is.
        """
        method, (W, b) = self.methods[name], widened(*self.original())
        p = self.view(name, W.dtype)
        if isinstance(method, Delta):
            return method.apply(p, torch.zeros_like(W), None)
        changed, bias = method.apply(p, W, b)
        return changed - self.site.fit(
            W, changed
        ), None if bias is b else bias if bias is None or b is None else bias - b

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight that an adapter makes, in the layer's own layout."""
        dW = self.change(adapter)[0].to(self.view(adapter).dtype)
        return self.site.kept(dW) if dW.shape == self.site.shape else dW

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Weights:
        """Weight and bias with these adapters on the original ones, in at least single precision."""
        if (leader := self._leader(names)) is not None:
            W, _ = leader.merged_weight(names)  # the very bits, so that the weights can be shared again
            return self.site.canonical(leader.site.kept(W)), self.original()[1]
        return self._stages(names, Base(self, pure=True)).weight()

    def leaders(self, name: str) -> list[AdaptedLayer]:
        """The layer whose tensors and weight an adapter's are here, where there is one."""
        return self._leaders.get(name, [])

    def _leader(self, names: list[str]) -> AdaptedLayer | None:
        """The layer that shares this one's weight and holds all of these adapters; None where there is none."""
        leaders = [self._leaders.get(n, [None])[0] for n in names]
        if any(leader is not leaders[0] for leader in leaders):
            return None
        return None if any(self.trainable(n) for n in names) else leaders[0]

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
        self.check_together([*self.merged_adapters, *names])
        with exactly(self.site.device):
            W, b = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not (finite(W) and (b is None or finite(b))):
            raise MergeError(f"merging {listing(names)} would write NaN or Inf into the weights; nothing was changed.")
        self.site.accepts(W)
        self.kept = write(self, (W, b), [*self.merged_adapters, *names])
        self.merged_adapters += names

    def part(self, shared: set[int]) -> None:
        kept = self.site.weight
        if id(kept) in shared and isinstance(kept, nn.Parameter) and not self._shared:
            if self.site.storage is not PLAIN or in_parts(kept):
                how = "quantised weight" if self.site.storage is not PLAIN else "weight in parts, one a process,"
                raise MergeError(f"a {how} that layers share ({self.keys}) cannot be parted to be merged into.")
            self._shared.append(kept)
            setattr(self.site.module, self.site.name, nn.Parameter(kept.detach().clone(), requires_grad=False))

    @property
    def parted(self) -> bool:
        return bool(self._shared) and not self.merged_adapters

    def unmerge(self) -> None:
        """Bring back the bits that were there before the first merge."""
        if self.kept is not None:
            self.kept.restore(self.site)
            note(self.site, None)
        if self._shared:
            setattr(self.site.module, self.site.name, self._shared.pop())
        self.kept, self.merged_adapters = None, []
