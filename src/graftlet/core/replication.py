# SPDX-License-Identifier: Apache-2.0
"""`layer_replication`: a deeper model out of the same blocks (arXiv 2312.15166 stacks them so).

`[[0, 4], [2, 6]]` runs blocks 0 1 2 3 2 3 4 5. The copies of a block share its weights, so that only what adapters add
to each of them takes memory. Merging gives every block weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import limits
from ..errors import ConfigError, listing
from .ties import Group, tied

Ranges = Sequence[Sequence[int]]


@dataclass
class Replicated:
    """What stands on the list of a replicated stack, as `stack.replicated`.

    original: the list that was here. order: which of its blocks each is. facts: what the model's config said then.
    """

    original: nn.ModuleList
    order: list[int]
    facts: dict[str, Any] = field(default_factory=dict)


def replicate(model: nn.Module, ranges: Ranges | None, adapted: bool) -> bool:
    """Rebuild a model's stack of blocks as `layer_replication` says; returns whether anything was done.

    adapted: the model has adapters, so its stack must stand already as it is asked for.

    Raises `ConfigError` where there is no one stack, a range is not inside it, or it stands otherwise.
    """
    if not ranges:
        return False
    parent, child, stack = _stack_of(model)
    if (count := sum(max(0, end - start) for start, end in ranges)) > limits.MAX_BLOCKS:
        raise ConfigError(
            f"layer_replication asks for {count:,} blocks; if they are meant, raise graftlet.limits.MAX_BLOCKS."
        )
    order = [i for start, end in ranges for i in range(start, end)]
    if adapted or "replicated" in vars(stack):
        if "replicated" not in vars(stack) or vars(stack)["replicated"].order != order:
            raise ConfigError(
                f"layer_replication={ranges!r} would rebuild the blocks under the adapters that are there; give it to "
                "the first adapter, and the same to the others."
            )
        return False
    _check(ranges, len(stack))
    made = nn.ModuleList(_twin(stack[i]) for i in order).train(stack.training)
    for index, block in enumerate(made):
        for module in block.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = index  # pyright: ignore[reportArgumentType]  where a cache keeps its part
    made.__dict__["replicated"] = Replicated(stack, order)  # not as an attribute: the list is no submodule of it
    setattr(parent, child, made)
    _tell(model, made)
    return True


def replicate_layers(model: nn.Module, layer_map: Ranges) -> None:
    """Rebuild a model's stack of blocks from ranges `[start, end)` of it, in place; the copies share their weights."""
    replicate(model, layer_map, adapted=False)


def restore(model: nn.Module) -> None:
    """Bring back the stack that was there before it was replicated; nothing where it was not."""
    for parent, child, stack in _found(model):
        config, before = _config_of(model, len(stack)), vars(stack)["replicated"]
        for name, value in before.facts.items():
            setattr(config, name, value)
        setattr(parent, child, before.original)


def separate(model: nn.Module) -> None:
    """Give every block of a replicated stack weights of its own, as an ordinary list of blocks."""
    for parent, child, stack in _found(model):
        seen: set[int] = set()
        for module in stack.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    held[name] = _own(tensor, seen)
        setattr(parent, child, nn.ModuleList(stack).train(stack.training))


def stack_path(model: nn.Module) -> str | None:
    """The path of the replicated stack of a model; None where there is none."""
    return next((name for name, module in model.named_modules() if "replicated" in vars(module)), None)


def tied_after(model: nn.Module) -> list[Group]:
    """The groups of places that share a parameter also when every block has weights of its own (`separate`)."""
    stack = stack_path(model)
    return [g for g in tied(model) if stack is None or not g.places[0][0].startswith(f"{stack}.")]


def _own(tensor: Any, seen: set[int]) -> Any:
    if tensor is None or id(tensor) not in seen:
        seen.add(id(tensor))
        return tensor
    own: Tensor = tensor.detach().clone()
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def _found(model: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    return [
        (parent, child, stack)
        for parent in model.modules()
        for child, stack in list(parent._modules.items())
        if isinstance(stack, nn.ModuleList) and "replicated" in vars(stack)
    ]


def _stack_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The one list of blocks that a model runs one after another."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [
        (path, parent, child, module)
        for path, parent in model.named_modules()
        for child, module in parent._modules.items()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    if found := _found(model):
        return found[0]
    stacks = [entry for entry in lists if depth is None or len(entry[3]) == depth]
    if len(stacks) != 1:
        names = listing(f"{path}.{child}" if path else child for path, _, child, _ in stacks) or "none"
        raise ConfigError(
            f"layer_replication needs a model with one stack of blocks; {type(model).__name__} has {names}."
        )
    return stacks[0][1], stacks[0][2], stacks[0][3]


def _check(ranges: Ranges, depth: int) -> None:
    for entry in ranges:
        if len(entry) != 2 or not 0 <= entry[0] < entry[1] <= depth:
            raise ConfigError(
                f"layer_replication has {list(entry)!r}; a range is [start, end) with 0 <= start < end <= {depth}, the "
                "number of blocks."
            )


def _tell(model: nn.Module, stack: nn.ModuleList) -> None:
    """Bring the model's config up to date: how deep the model is, and what each block is."""
    made = vars(stack)["replicated"]
    depth = len(made.original)
    config = _config_of(model, depth)
    if config is None:
        return
    kinds = getattr(config, "layer_types", None)
    made.facts = {"num_hidden_layers": depth, **({} if kinds is None else {"layer_types": kinds})}
    config.num_hidden_layers = len(stack)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in made.order]


def _config_of(model: nn.Module, depth: int) -> Any:
    config: Any = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", None)
    found = [
        c for c in (config, inner() if callable(inner) else None) if getattr(c, "num_hidden_layers", None) == depth
    ]
    return found[0] if found else None


def _twin(module: nn.Module) -> nn.Module:
    """A module that works as this one does, with the same tensors."""
    twin = module.__new__(type(module))
    twin.__dict__ = {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()}
    for name, child in module._modules.items():
        twin._modules[name] = child if child is None else _twin(child)
    return twin
