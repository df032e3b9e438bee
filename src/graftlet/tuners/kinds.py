# SPDX-License-Identifier: Apache-2.0
"""The reference's classes of layers, as questions: `isinstance(module, lora.Linear)`.

The reference has a class for each method on each kind of layer. Here one class adapts all of them, so these are no classes
that anything is made of: an instance of `lora.Linear` is whatever has a LoRA adapter on a plain linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.block import BlockHost
from ..core.host import AdapterHost, Shell
from ..core.layer import AdaptedLayer
from ..core.replace import ModulesToSaveWrapper, Replacement
from ..errors import ConfigError
from ..registry import Entry, lookup

Test = Callable[[Any], bool]


class Kind(type):
    """A class by what its instances are, not by how they were made. Classes that derive from it count too."""

    test: Test
    among: tuple[type, ...]

    def __instancecheck__(cls, instance: Any) -> bool:
        return type.__instancecheck__(cls, instance) or ("test" in cls.__dict__ and cls.test(instance))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return type.__subclasscheck__(cls, subclass) or issubclass(subclass, cls.__dict__.get("among", ()))


def kind(name: str, test: Test, doc: str, among: tuple[type, ...] = ()) -> Any:
    """A class whose instances pass a test. among: the classes that all of whose instances do."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        if "test" in cls.__dict__:
            raise ConfigError(
                f"a {cls.__name__} is not made by itself; get_peft_model or inject_adapter_in_model adapts."
            )
        return object.__new__(cls)

    facts = {"test": staticmethod(test), "among": among, "__doc__": doc, "__new__": refuse, "__module__": __name__}
    return Kind(name, (), {**facts, "__qualname__": name})


def _tuner_layer(module: Any) -> bool:
    return isinstance(module, AdapterHost) and not isinstance(module, ModulesToSaveWrapper)


BaseTunerLayer: Any = kind(
    "BaseTunerLayer",
    _tuner_layer,
    "Whatever an adapter acts in; not the copies of `modules_to_save`.",
    (AdaptedLayer, BlockHost),
)
AuxiliaryTrainingWrapper: Any = kind(
    "AuxiliaryTrainingWrapper",
    lambda module: isinstance(module, (ModulesToSaveWrapper, Shell)),
    "Modules that are trained beside an adapter: whole copies, or some rows of an embedding.",
    (ModulesToSaveWrapper, Shell),
)

SITES = {
    "Linear": ("Linear", "Conv1D"),
    "Conv1d": ("Conv1d",),
    "Conv2d": ("Conv2d",),
    "Conv3d": ("Conv3d",),
    "Embedding": ("Embedding",),
    "MultiheadAttention": ("MultiheadAttention",),
}
"""The modules that a class's name ends in means."""
BACKENDS = {
    "Linear4bit": "bnb 4bit",
    "Linear8bitLt": "bnb 8bit",
    "GPTQLoraLinear": "GPTQ",
    "AwqLoraLinear": "AWQ",
    "AqlmLoraLinear": "AQLM",
    "HqqLoraLinear": "HQQ",
    "EetqLoraLinear": "EETQ",
    "TorchaoLoraLinear": "torchao",
}
"""The quantised layers that have classes of their own."""


class Kinds:
    """The classes of one method's layers, made when they are asked for: `LoraLayer`, `Linear`, `Linear4bit`."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = layer_kind(lookup(self.method), name)
        made.__qualname__ = f"{self.method}.{name}"
        setattr(self, name, made)
        return made


def layer_kind(entry: Entry, name: str) -> Any:
    """The class of a method's layers that the reference calls `name`."""
    backend, site = BACKENDS.get(name), next((s for s in SITES if name.endswith(s)), None)

    def test(module: Any) -> bool:
        if not _tuner_layer(module) or not _of(entry, module):
            return False
        if name.endswith("Layer") or not isinstance(module, AdaptedLayer):
            return name.endswith("Layer")
        if name == "ParamWrapper":
            return module.site.name != "weight"
        if backend is not None or module.site.storage.backend:
            return module.site.storage.backend == backend
        return site is not None and _named(module.site.module, SITES[site])

    return kind(name, test, f"Layers with an adapter of {entry.name}, as far as their kind is {name}.")


def _of(entry: Entry, host: AdapterHost) -> bool:
    """Whether a method has an adapter here."""
    if isinstance(host, Replacement):
        return host.names[1].startswith(entry.prefix)
    return isinstance(host, (AdaptedLayer, BlockHost)) and any(
        isinstance(config, entry.config) for config in host.configs.values()
    )


def _named(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    globals()[name] = Kinds(name)
    return globals()[name]
