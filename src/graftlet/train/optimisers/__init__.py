# SPDX-License-Identifier: Apache-2.0
"""Optimisers made for LoRA's two factors, and how a recipe asks for them by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core.host import hosts
from ...core.layer import AdaptedLayer
from ...errors import ConfigError


@dataclass(frozen=True)
class Factors:
    """A LoRA pair on a layer: A `[r, in]`, B `[out, r]`, and what their product is multiplied by."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float


def pairs(model: nn.Module) -> Iterator[Factors]:
    """The pairs of matrices of the active adapters, whether they learn or not.

    Embeddings, convolutions and stacks of experts have none.
    """
    for _, host in hosts(model):
        if not isinstance(host, AdaptedLayer) or host.site.stack:
            continue
        for name in host.active_adapters:
            if {"lora_A.weight", "lora_B.weight"} <= host.specs.get(name, {}).keys():
                A, B = (host.tensor(name, f"lora_{f}.weight") for f in "AB")
                if A.dim() == 2 and isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter):
                    yield Factors(A, B, float(host.scalings[name]))


def check_pairs(model: nn.Module, name: str) -> list[Factors]:
    """The model's pairs. Raises `ConfigError` where it has none, or the model is none with adapters."""
    found = list(pairs(model))
    if not found:
        raise ConfigError(f"{name} needs the matrices lora_A and lora_B of an active LoRA adapter; the model has none.")
    return found


def eight_bit(optimizer_cls: type[Optimizer]) -> bool:
    """Whether an optimiser keeps its state in 8 bits, by bitsandbytes."""
    return optimizer_cls.__module__.partition(".")[0] == "bitsandbytes" and "8bit" in optimizer_cls.__name__


def keep_embeddings_exact(model: nn.Module) -> None:
    """Let bitsandbytes keep the optimiser's state of embeddings in 32 bits: in 8 they are unstable."""
    import bitsandbytes  # an 8-bit optimiser is in hand

    optim: Any = bitsandbytes.optim
    manager = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


class Turning(Optimizer):
    """Comes before an optimiser class, and turns the gradients before each of its steps."""

    turn: Callable[[], None]

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise ConfigError("step takes no closure here: it would make new gradients after these were turned.")
        self.turn()
        return super().step()


def turning(kind: type[Optimizer], turn: Callable[[], None], model: nn.Module, prefix: str, **kwargs: Any) -> Optimizer:
    """An optimiser of a class over all that learns in a model, whose steps see gradients that `turn` has changed.

    Raises `ConfigError` where the class is no optimiser, or needs a closure.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(f"optimizer_cls={kind!r} is no subclass of torch.optim.Optimizer.")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"{kind.__name__} needs a closure, which makes new gradients within a step.")
    made: Any = type(f"{prefix}{kind.__name__}", (Turning, kind), {})
    optimizer = made([p for p in model.parameters() if p.requires_grad], **kwargs)
    optimizer.turn = turn
    if eight_bit(kind):
        keep_embeddings_exact(model)
    return optimizer


Make = Callable[[nn.Module, float, float, dict[str, Any]], Optimizer]
"""(model, learning rate, weight decay, the optimiser's options) -> the optimiser."""

NAMES = ("loraplus", "lorafa", "riemannian")
"""What a recipe calls them; each is made by `for_recipe` in the module of its name."""


def by_name(name: str, model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]) -> Optimizer:
    """One of `NAMES`, as a recipe asks for it. Raises `ConfigError` for options that it does not take."""
    make: Make = importlib.import_module(f".{name}", __name__).for_recipe
    try:
        return make(model, lr, weight_decay, options)
    except TypeError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"optimizer {name!r} with {options}: {error}.") from error


def optimiser_class(name: str) -> type[Optimizer]:
    """An optimiser class by its name in `torch.optim`, or in bitsandbytes; AdamW unless said otherwise."""
    found = getattr(torch.optim, name, None)
    if found is None:
        try:
            import bitsandbytes  # pyright: ignore[reportMissingImports]

            found = getattr(bitsandbytes.optim, name, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"optimiser {name!r} is neither in torch.optim nor in an installed bitsandbytes.")
    return found
