# SPDX-License-Identifier: Apache-2.0
"""FSDP2 (torch's `fully_shard`) on a model with adapters, and what several processes send each other a step."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import nn

from ..core.host import bare
from ..errors import ConfigError
from ..model.parts import root_of
from ..weights.whole import shape_of

M = TypeVar("M", bound=nn.Module)


def shard(model: M, blocks: tuple[str, ...] | None = None, **options: Any) -> M:
    """Keep each of a model's blocks, and the rest of it, in parts, one a process; a block is put together as it is called.

    Adapters are put on first. The optimiser is made afterwards, of `model.parameters()`. Saving is as ever, on all processes.

    Args:
        blocks: the names of the blocks' classes; a transformers model tells them itself.
        options: of `torch.distributed.fsdp.fully_shard`: `mp_policy`, `offload_policy`, `mesh`, `reshard_after_forward`.

    Raises:
        ConfigError: the model does not tell its blocks, or has none of those named.
    """
    from torch.distributed.fsdp import fully_shard

    names = set(blocks or getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(bare(m)).__name__ in names]
    within = {id(child) for m in found for child in m.modules() if child is not m}
    found = [m for m in found if id(m) not in within]
    if not found:
        raise ConfigError(
            f"blocks={blocks!r}: no module of {type(model).__name__} is of such a class; name the class of its layers."
        )
    for block in found:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def sent(model: nn.Module, processes: int, engine: Literal["ddp", "fsdp2"] = "ddp", full: bool = False) -> int:
    """Bytes that each process sends for one optimiser step without accumulation.

    DDP sums the gradients of what learns: 2 (n - 1) / n of their size, by a ring. FSDP2 gathers every weight for the forward
    and again for the backward, and scatters the sums of the gradients: 2 (n - 1) / n of the weights and (n - 1) / n of those.

    full: as if all parameters learned.
    """
    held = {id(p): p for p in root_of(model).parameters()}.values()
    sizes = {id(p): shape_of(p).numel() * p.element_size() for p in held}
    learning = sum(sizes[id(p)] for p in held if p.requires_grad or full)
    weights = 2 * sum(sizes.values()) if engine == "fsdp2" else 0
    return ((weights + learning) if engine == "fsdp2" else 2 * learning) * (processes - 1) // processes
