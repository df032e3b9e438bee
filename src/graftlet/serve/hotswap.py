# SPDX-License-Identifier: Apache-2.0
"""Another adapter's tensors in the place of one that is there: no layer is made or taken out, nothing compiled again.

All of it is checked before any tensor is written, so a file that does not fit leaves the old adapter serving.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import Excludes, FanInFanOut, Layers, PeftConfig, Saves, Targets
from ..core import state
from ..core.host import COMPILED, AdapterHost, check_known, home_within, hosts
from ..core.layer import AdaptedLayer
from ..core.method import Method, View
from ..core.tensors import as_held, attribute
from ..core.traffic import Traffic
from ..errors import AdapterFileError, CallError, ConfigError, MergeError, RecompileWarning, warn
from ..model.parts import configs_of, near, root_of
from ..model.save import Checks, opened
from ..registry import lookup


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put a saved adapter into the place of the adapter `adapter_name`, which keeps its name.

    Args:
        torch_device: where the file's tensors are read to first; unless given, the model's GPU, or the CPU.
        kwargs: as in `from_pretrained`.

    Raises:
        AdapterFileError: the file is missing, damaged, not finite, or of another structure. ConfigError: of another method,
            or with other options. MergeError: the adapter is merged. The model is as it was.
    """
    config, stored = opened(model_name_or_path, None, Checks.of(kwargs), device=torch_device or near(model), **kwargs)
    tensors = stored.read()
    with _traffic(model).change():
        swap(model, tensors, adapter_name, config, str(model_name_or_path))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors by their keys in memory, or in a file. Raises as `hotswap_adapter` does.

    parameter_prefix: kept for callers of the reference; the layers know their own tensors.
    """
    known = _keys_in_memory(root_of(model), adapter_name)
    given = {key.replace(f"{COMPILED}.", ""): tensor for key, tensor in state_dict.items()}
    with _traffic(model).change():
        swap(model, {known.get(k, k): t for k, t in given.items()}, adapter_name, config, "the given dictionary")


def _traffic(model: nn.Module) -> Traffic:
    """Who calls a model, and who changes it."""
    return home_within(root_of(model)).traffic


def _keys_in_memory(model: nn.Module, adapter: str) -> dict[str, str]:
    """The keys of an adapter's tensors in memory, with those that they have in a file."""
    found = {}
    for path, host in hosts(model):
        for name, spec in host.specs.get(adapter, {}).items() if isinstance(host, AdaptedLayer) else ():
            box, _, entry = name.partition(".")
            found[f"{path}.{box}.{adapter}{entry and '.'}{entry}"] = f"{path}.{spec.disk or name}"
    return found


class Factored:
    """What a layer holds of an adapter, before it may get factors of another rank."""

    def __init__(self, layer: AdaptedLayer, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.rank, self.specs = layer.__dict__["r"][adapter], layer.specs[adapter]
        held = {name: layer.tensor(adapter, name) for name in self.specs}
        self.tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in held.items()}

    def restore(self) -> None:
        """Put it back: the very tensors, with what was in them."""
        self.layer.__dict__["r"][self.adapter], self.layer.specs[self.adapter] = self.rank, self.specs
        for name, (tensor, value) in self.tensors.items():
            tensor.copy_(value)
            self.layer.put(self.adapter, name, tensor, self.specs[name])


@dataclass
class Exchange:
    """What a swap writes, worked out before. held: layers that get factors of another rank, as a view of the file's."""

    config: PeftConfig
    adapter: str
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held: list[tuple[AdaptedLayer, View]] = field(default_factory=list)
    settings: list[tuple[AdaptedLayer, str, Any]] = field(default_factory=list)

    def settled(self, layer: AdaptedLayer) -> dict[str, Any]:
        """What the new config means for a layer."""
        return layer.methods[self.adapter].settings(layer.site, self.config, layer.keys[self.adapter])

    @torch.no_grad()
    def write(self) -> None:
        """Do it; where it fails, what was there is put back."""
        before = [(place, place.clone()) for place, _ in self.copies]
        settings = [(layer, name, _copied(layer.__dict__[name][self.adapter])) for layer, name, _ in self.settings]
        held = [Factored(layer, self.adapter) for layer, _ in self.held]
        try:
            self._write()
        except BaseException:
            for layer in held:
                layer.restore()
            for place, value in before:
                place.copy_(value)
            for layer, setting, value in settings:
                _set(layer, self.adapter, setting, value)
            raise

    def _write(self) -> None:
        for place, value in self.copies:
            place.copy_(value)
        for layer, setting, value in self.settings:
            _set(layer, self.adapter, setting, value)
        for layer, theirs in self.held:
            method, own = layer.methods[self.adapter], layer.view(self.adapter)
            if theirs.r > own.r:
                _resize(layer, self.adapter, theirs.r)
            factors = method.factored(theirs)
            assert factors is not None
            method.hold(layer.view(self.adapter), factors, method.change_bias(theirs, layer.original))


def swap(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str, config: PeftConfig, origin: str) -> None:
    """Exchange an adapter's tensors, scalings and config for others of the same structure."""
    model = root_of(model)
    configs = configs_of(model)
    check_known([adapter], list(configs))
    check_hotswap_configs_compatible(configs[adapter], config)
    found = {path: host for path, host in hosts(model) if adapter in host.adapters}
    if any(adapter in host.merged_adapters for host in found.values()):
        raise MergeError(f"adapter {adapter!r} is merged, so another cannot take its place; unmerge it first.")
    state.check_finite(tensors, origin)
    work = _worked_out(model, found, tensors, Exchange(config, adapter), origin)
    work.write()
    kept = {f.name for f in fields(PeftConfig)} | {"target_modules"}
    vars(configs[adapter]).update({k: v for k, v in vars(config).items() if k not in kept})
    if work.held:
        _record(configs[adapter], [h for h in found.values() if isinstance(h, AdaptedLayer)], adapter)


def _worked_out(
    model: nn.Module, found: Mapping[str, AdapterHost], tensors: Mapping[str, Tensor], work: Exchange, origin: str
) -> Exchange:
    adapter = work.adapter
    there = state.placed(model, adapter)
    wanted = state.slots(model, adapter, configs_of(model)[adapter], tensors, there)
    given = state.unpacked(there, adapter, tensors)
    resized = {word.split(" ")[0] for word in state.fit(wanted, given).misshaped}
    for path, host in found.items():
        own = {key for key, slot in wanted.items() if slot.host is host}
        if isinstance(host, AdaptedLayer):
            _settings(host, adapter, work)
            lacking = bool(own) and not own & given.keys()
            if (lacking or own & resized) and _held(host, path, {} if lacking else given, work):
                wanted = {key: slot for key, slot in wanted.items() if key not in own}
                given = {key: tensor for key, tensor in given.items() if key not in own}
    if complaints := state.fit(wanted, given).complaints():
        raise AdapterFileError(f"{origin} cannot take the place of adapter {adapter!r}: {'; '.join(complaints)}.")
    work.copies += [(slot.tensor, given[key]) for key, slot in wanted.items()]
    return work


def _settings(layer: AdaptedLayer, adapter: str, work: Exchange) -> None:
    """The settings that differ; all that cannot be exchanged stands in the config, and is compared there."""
    method = layer.methods[adapter]
    for name, value in work.settled(layer).items():
        if name in method.exchangeable and layer.setting(adapter, name) != value:
            work.settings.append((layer, name, value))


def _held(layer: AdaptedLayer, path: str, given: Mapping[str, Tensor], work: Exchange) -> bool:
    """Plan to put factors of another rank, or none, into a layer; False where they have another form altogether."""
    view, method = layer.view(work.adapter), layer.methods[work.adapter]
    if not method.universal:
        return False
    new = {k: v for k, v in work.settled(layer).items() if k in method.exchangeable or (given and k == "r")}
    ranked = view.over(new)
    wanted = layer.shapes(work.adapter, ranked)
    tensors = {n: given.get(f"{path}.{n}", torch.zeros(0 if given else shape)) for n, shape in wanted.items()}
    if any(t.shape != wanted[n] for n, t in tensors.items()):
        return False
    place = {"device": layer.site.device, "dtype": view.dtype}
    work.held.append((layer, ranked.over({attribute(n): t.to(**place) for n, t in tensors.items()})))
    return True


def _copied(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _set(layer: AdaptedLayer, adapter: str, name: str, value: Any) -> None:
    held = layer.__dict__[name]
    if isinstance(held[adapter], Tensor):
        held[adapter].fill_(value)
    else:
        held[adapter] = value


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise `ConfigError` where adapters of these configs cannot take each other's place.

    They must be of one method and one variant of it, with the same options; targets, ranks and scalings are compared with
    the model layer by layer.
    """
    if config0.peft_type != config1.peft_type or type(config0) is not type(config1):
        raise ConfigError(f"a {config1.peft_type} adapter cannot take the place of a {config0.peft_type} adapter.")
    if config0.is_prompt_learning:
        raise ConfigError(
            f"{config0.peft_type} adapters change no layers, so there is nothing to swap; use set_adapter."
        )
    method = lookup(config0.peft_type).method
    layered = method() if issubclass(method, Method) else None
    free = {f.name for kind in PLACES for f in fields(kind)} | {"target_parameters", "runtime_config"}
    free |= set(layered.scales) if layered is not None else set()
    if layered is None or not layered.derived(config1):
        free |= {f.name for f in fields(config0) if f.name.startswith("init_")}
    for name in (f.name for f in fields(config0) if f.name not in free):
        old, new = getattr(config0, name), getattr(config1, name)
        if old != new:
            raise ConfigError(
                f"configs are incompatible: {name} is {old!r} for the adapter there and {new!r} for the other."
            )


PLACES = (PeftConfig, Targets, Excludes, Layers, Saves, FanInFanOut)
"""Config classes whose fields say where an adapter stands, and not what it does."""


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | dict[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make a model ready to be compiled once and to serve adapters of different ranks and scalings after that.

    Call it after the first adapter is there, before `torch.compile`. Scalings become tensors; ranks become `target_rank`,
    with zeros beside what is there.

    Args:
        target_rank: the highest rank that will come; left as they are unless given.
        config: configs whose ranks become `target_rank` too; the model's own ones do in any case.
        check_compiled: what to do about a model that is compiled already.

    Raises `CallError` where the model is compiled, has no adapter, or has one of a higher rank; it is as it was.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise CallError(f"check_compiled={check_compiled!r}; allowed: error, warn, ignore.")
    if _compiled(model) and check_compiled == "error":
        raise CallError("the model is compiled already; call prepare_model_for_compiled_hotswap before torch.compile.")
    if _compiled(model) and check_compiled == "warn":
        warn(
            RecompileWarning, "the model is compiled already, and will be compiled again once its scalings are tensors."
        )
    model = root_of(model)
    held = [(h, n) for _, h in hosts(model) if isinstance(h, AdaptedLayer) for n in h.adapters]
    if not held:
        raise CallError("the model has no adapter yet; load the first one before this.")
    ranked = [(h, n) for h, n in held if h.methods[n].universal] if target_rank is not None else []
    for layer, name in ranked:
        if layer.view(name).r > (target_rank or 0):
            raise CallError(
                f"target_rank={target_rank}, but adapter {name!r} has rank {layer.view(name).r} on {layer.keys[name]}."
            )
    for layer, name in ranked:
        _resize(layer, name, target_rank or 0)
    for layer, name in held:
        for setting in layer.methods[name].exchangeable:
            value = layer.__dict__.get(setting, {}).get(name)
            if isinstance(value, (int, float)):
                layer.__dict__[setting][name] = torch.tensor(float(value), device=layer.site.device)
    for name in dict.fromkeys(n for _, n in ranked):
        _record(configs_of(model)[name], [h for h, n in ranked if n == name], name)
    for other in config.values() if isinstance(config, dict) else [config] if config is not None else []:
        if target_rank is not None and not any(other is c for c in configs_of(model).values()):
            vars(other).update(
                r=target_rank, rank_pattern=dict.fromkeys(getattr(other, "rank_pattern", None) or {}, target_rank)
            )


def _compiled(model: nn.Module) -> bool:
    return COMPILED in model._modules or getattr(model, "_compiled_call_impl", None) is not None


@torch.no_grad()
def _resize(layer: AdaptedLayer, name: str, rank: int) -> None:
    """Give an adapter's tensors on a layer another rank, and keep what it does."""
    method, view = layer.methods[name], layer.view(name)
    if view.r == rank:
        return
    before, bias = method.factored(view), method.change_bias(view, layer.original)
    learns = {n: layer.tensor(name, n).requires_grad for n in layer.specs[name]}
    layer.__dict__["r"][name] = rank
    layer.specs[name] = method.params(layer.site, layer.view(name))
    for tensor, shape in layer.shapes(name, layer.view(name)).items():
        old = layer.tensor(name, tensor)
        made = as_held(old.new_zeros(shape), layer.specs[name][tensor])
        layer.put(name, tensor, made.requires_grad_(learns[tensor]), layer.specs[name][tensor])
    assert before is not None
    method.hold(layer.view(name), before, bias)


def _record(config: PeftConfig, layers: list[AdaptedLayer], name: str) -> None:
    """Let a config tell what the layers hold."""
    layers[0].methods[name].recorded(config, [layer.view(name) for layer in layers])
