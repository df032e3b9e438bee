# SPDX-License-Identifier: Apache-2.0
"""What is done to all adapters of a model at once: activate, enable, freeze, merge, unload, delete.

Each either happens on every layer or on none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..errors import MergeError, MergeWarning, RoundingWarning, listing, warn
from ..weights.rounding import Rounding, noted
from ..weights.whole import in_parts, made_whole
from .context import choosing
from .host import AdapterHost, bare, check_known, commons, home_within, hosts, standing
from .layer import AdaptedLayer
from .replace import Replacement
from .target import walk
from .tensors import Common, Groups
from .ties import tied


def adapters_of(model: nn.Module) -> list[str]:
    """The names of all adapters that any layer of a model holds, in the order they came."""
    return list(dict.fromkeys(n for host in standing(model)[0] for n in host.adapters))


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make one adapter, or several together, the active ones on every layer.

    Raises `AdapterNameError` where a name is unknown; nothing is changed then.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    found, shared = standing(model)
    if not all(any(host.holds(name) for host in found) for name in names):
        check_known(names, adapters_of(model))
    for host in found if len(names) > 1 else ():
        host.check_together(names)
    for host in found:
        host.set_adapter(names, inference_mode)
    for box in shared:
        for name in box:
            box.set_requires_grad(name, name in names and not inference_mode)


def check_together(model: nn.Module, names: list[str]) -> None:
    """Raise where adapters cannot act together."""
    for host in standing(model)[0]:
        host.check_together(names)


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Let adapters learn, or freeze them, whether they are active or not."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    check_known(names, adapters_of(model))
    for _, host in hosts(model):
        for name in names:
            if name in host.adapters:
                host.set_requires_grad(name, requires_grad)
    for _, box in commons(model):
        for name in names:
            box.set_requires_grad(name, requires_grad)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Let the active adapters act on every layer, or the base model alone."""
    for _, host in reversed(list(hosts(model))):
        host.enable_adapters(enabled)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone, until the block ends, also where adapters are merged; on this thread, and no other.

    What learns stays as it is.
    """
    with choosing(home_within(model), ()):
        yield


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name on every layer."""
    for host in (found := standing(model))[0]:
        host.rename(old, new)
    for box in found[1]:
        box.rename(old, new)


def delete_adapter(model: nn.Module, adapter_name: str) -> list[str]:
    """Forget an adapter on every layer. Returns what is active then."""
    found = list(hosts(model))
    check_known([adapter_name], adapters_of(model))
    if any(adapter_name in host.merged_adapters for _, host in found):
        raise MergeError(f"adapter {adapter_name!r} is merged; unmerge before deleting it.")
    for _, host in found:
        host.delete_adapter(adapter_name)
    for _, box in commons(model):
        box.forget(adapter_name)
    return next((host.active_adapters for _, host in found if host.active_adapters), [])


def merge(
    model: nn.Module, safe_merge: bool = True, adapter_names: list[str] | None = None, progress: Any = iter
) -> None:
    """Write the active (or named) adapters into the base weights of every layer, or of none where one cannot be.

    Raises `MergeError` where a result is not finite or has no place in a weight, `AdapterNameError` for unknown names.
    """
    found = [host for _, host in hosts(model)]
    if adapter_names is not None:
        check_known(adapter_names, adapters_of(model))
    if found and not any(host.to_merge(adapter_names) for host in found):
        merged = sorted({n for host in found for n in host.merged_adapters})
        warn(MergeWarning, f"nothing to merge: {listing(merged) or 'no adapter'} is merged already.", stacklevel=4)
        return
    before = [(host, list(host.merged_adapters)) for host in found]
    shared = {id(group.parameter) for group in tied(model)}
    try:
        with _made_whole(model, found):
            for host in progress(found):
                if host.to_merge(adapter_names):
                    host.part(shared)
                    host.merge(safe_merge, adapter_names)
        _tell_rounding(model, [host for host, names in before if host.merged_adapters != names])
    except BaseException:
        _take_back(before)
        raise


@contextmanager
def _made_whole(model: nn.Module, found: list[AdapterHost]) -> Iterator[None]:
    """Let adapters that an engine keeps in parts be whole until the block ends; the base's weights stay as they are."""
    if not any(map(in_parts, model.parameters())):
        yield
        return
    if any(in_parts(p) for host in found if isinstance(host, Replacement) for p in host.parameters()):
        raise MergeError(
            "modules_to_save that an engine keeps in parts cannot be merged; load the adapter into a whole base."
        )
    own = {id(p) for host in found for p in host.parameters()} | {
        id(p) for _, b in commons(model) for p in b.parameters()
    }
    with made_whole(model, own - {id(p) for host in found for p in bare(host).parameters()}):
        yield


def _tell_rounding(model: nn.Module, changed: list[AdapterHost]) -> None:
    """Say what was lost by rounding, where layers that were merged into are quantised."""
    lost = roundings(model) if any(True for h in changed for _ in noted(bare(h))) else {}
    if lost:
        worst = max(lost, key=lambda path: lost[path].change)
        warn(
            RoundingWarning,
            f"{len(lost)} quantised layers were merged into, and rounded. Worst is {worst!r}: off by "
            f"{lost[worst].weight:.1%} of its weight, which is {lost[worst].change:.0%} of what the adapter changes. "
            "merge_errors(model) tells all; merge_and_unload(dequantize=True) rounds nothing.",
            stacklevel=5,
        )


def roundings(model: nn.Module) -> dict[str, Rounding]:
    """What merging lost in each quantised layer, by the layer's path in the model as it stands."""
    return {place.path: rounding for place in walk(model) for rounding in noted(place.bare)}


def _take_back(before: list[tuple[AdapterHost, list[str]]]) -> None:
    for host, names in reversed(before):
        if host.merged_adapters != names or host.parted:
            host.unmerge()
            if names:
                host.merge(False, names)


def unmerge(model: nn.Module) -> None:
    """Bring back every base weight's bits from before the first merge, the last merged first."""
    found = [host for _, host in hosts(model)]
    if not any(host.merged for host in found):
        warn(MergeWarning, "nothing to unmerge: no adapter is merged.", stacklevel=4)
    for host in reversed(found):
        if host.merged:
            host.unmerge()


def unload(model: nn.Module) -> None:
    """Take every wrapper out. What is merged stays in the weights; a merged replacement is the module from now on."""
    for name, child in list(model._modules.items()):  # each place, also of a module that stands in two
        if child is None:
            continue
        if isinstance(child, (Common, Groups)):
            delattr(model, name)
            continue
        setattr(model, name, bare(child))
        unload(getattr(model, name))


def mark_trainable(model: nn.Module, configs: dict[str, PeftConfig]) -> None:
    """Freeze the base; the active adapters of `configs` learn, and the biases that they name."""
    found, boxes = standing(model)
    ours = {id(p) for host in found for n in host.adapters for p in host.parameters_of(n)}
    ours |= {id(p) for box in boxes for p in box.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad = False
    for name, config in configs.items():
        active = any(name in host.active_adapters for host in found)
        if active and not config.inference_mode:
            for bias in biases(model, config, name).values():
                bias.requires_grad = True


def biases(model: nn.Module, config: PeftConfig, adapter: str) -> dict[str, nn.Parameter]:
    """The base's biases that an adapter trains, by their path: all of them, or the adapted layers' own."""
    if config.bias == "none":
        return {}
    if config.bias == "all":
        inside = [f"{path}.{box}" for path, h in hosts(model) for box in _not_base(h)]
        return {
            n: p
            for n, p in model.named_parameters()
            if n.rpartition(".")[2] == "bias" and not any(n.startswith(i) for i in inside)
        }
    found: dict[str, nn.Parameter] = {}
    for path, host in hosts(model):
        if isinstance(host, AdaptedLayer) and adapter in host.adapters:
            bias = getattr(host.base_layer, "bias", None)
            if isinstance(bias, nn.Parameter):
                found[f"{path}.base_layer.bias"] = bias
    return found


def _not_base(host: AdapterHost) -> list[str]:
    """The children of a wrapper whose biases are not the base's own; all of it where an adapter replaces it whole."""
    if isinstance(host, Replacement):
        return [""]
    return [f"{name}." for name, module in host._modules.items() if module is not host.base]


def relink(model: nn.Module, adapter: str) -> None:
    """Share again what an adapter's layers share, after its tensors were loaded one by one."""
    found = standing(model)[0]
    layers = {h.keys[adapter]: h for h in found if isinstance(h, AdaptedLayer) and adapter in h.methods}
    for kind in dict.fromkeys(type(h.methods[adapter]) for h in layers.values()):
        own = {key: h for key, h in layers.items() if type(h.methods[adapter]) is kind}
        next(iter(own.values())).methods[adapter].link(own, adapter)
    for host in found:
        if isinstance(host, Replacement):
            host.relink(adapter)
