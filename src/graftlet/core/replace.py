# SPDX-License-Identifier: Apache-2.0
"""Modules that are trained whole, as a copy beside the frozen original: `modules_to_save`, LN-tuning."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CallError, MergeError
from ..weights.offloaded import present
from ..weights.rounding import finite
from .context import current
from .host import AdapterHost
from .tensors import Box, renamed


class Replacement(AdapterHost):
    """Stands in for a module and runs one adapter's trained copy of it, or the original.

    copies: the attribute that holds the copies by adapter. original: the frozen module's. on_disk: whether the copies'
    attribute stands in the file's keys; where not, the file has the module's own keys.
    """

    def __init__(self, module: nn.Module, original: str, copies: str, on_disk: bool) -> None:
        super().__init__()
        self.names = (original, copies)
        self.on_disk = on_disk
        self._modules[original], self._modules[copies] = module, Box()  # whatever attributes the module has itself
        self._leaders: dict[str, list[Replacement]] = {}
        self._frozen: list[nn.Module] = []  # the original while a copy is merged; no submodule meanwhile

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            names = self.__dict__.get("names")
            if names is None or names[0] not in self.__dict__["_modules"]:
                raise
            active = [n for n in self.acting(current()) if n in self.copies]
            return getattr(self.copies[active[0]] if active else self.base, name)

    @property
    def base(self) -> nn.Module:
        return cast(nn.Module, self._modules[self.names[0]])

    @property
    def pristine(self) -> nn.Module:
        """The original, also while a copy is merged."""
        return self._frozen[0] if self._frozen else self.base

    @property
    def copies(self) -> Box:
        """The copies by adapter."""
        return cast(Box, self._modules[self.names[1]])

    @property
    def adapters(self) -> list[str]:
        return self.copies.keys()

    def attach(self, name: str, module: nn.Module | None = None, leader: Replacement | None = None) -> None:
        """Give an adapter its own copy of the original (or `module`, made ready elsewhere).

        leader: the wrapper that holds what this one's copy shares with it.
        """
        self.copies.put(name, copy.deepcopy(self.base) if module is None else module)
        self._learning.add(name)
        if leader is not None:
            self._leaders[name] = [leader]

    def relink(self, name: str) -> None:
        """Share again with the leader's copy, after its tensors were loaded one by one."""
        if name in self._leaders and name in self.copies:
            mine, theirs = self.copies[name], self._leaders[name][0].copies[name]
            for key, parameter in theirs.named_parameters(recurse=False):
                if getattr(mine, key, None) is not None:
                    setattr(mine, key, parameter)

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self.copies.rename(old, new)
        renamed(self._leaders, old, new)

    def forget(self, name: str) -> None:
        self.copies.drop(name)
        self._learning.discard(name)
        self._leaders.pop(name, None)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.copies:
            return {}
        return {f"{self._prefix}{n}": p for n, p in self.copies[name].named_parameters()}

    def state(self, name: str) -> dict[str, Tensor]:
        if name not in self.copies:
            return {}
        return {f"{self._prefix}{n}": t for n, t in self.copies[name].state_dict(keep_vars=True).items()}

    def assign(self, name: str, key: str, value: Tensor) -> None:
        path, _, leaf = key.removeprefix(self._prefix).rpartition(".")
        owner, model = self.copies[name].get_submodule(path), self.base.get_submodule(path)
        held, place = getattr(owner, leaf), present(model, leaf, getattr(model, leaf)).device
        if not held.is_meta:
            held.copy_(value)
            return
        made = value.to(place, held.dtype, copy=True)
        setattr(owner, leaf, nn.Parameter(made, held.requires_grad) if isinstance(held, nn.Parameter) else made)

    @property
    def _prefix(self) -> str:
        return f"{self.names[1]}." if self.on_disk else ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is not None and call.rows is not None and not self.off(call):
            return self._mixed(call.rows, args, kwargs)
        names = self.acting(call)
        base = self.pristine if self.pure(call) else self.base
        return (self.copies[names[-1]] if names else base)(*args, **kwargs)

    def _mixed(self, rows: tuple[str, ...], args: tuple, kwargs: dict) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        call = current()
        count = x.shape[0] if isinstance(x, Tensor) else None
        groups = call.groups(count, x.device) if call is not None and isinstance(x, Tensor) else None
        if groups is None:
            raise CallError(
                f"adapter_names has {len(rows)} rows, which cannot be told apart in {type(self.base).__name__}."
            )
        parts, base = [], self.pristine
        for name, index in groups:
            module = self.copies[name] if name in self.copies else base  # noqa: SIM401  a Box is no dict
            parts.append(module(*[a.index_select(0, index) if _batched(a, count) else a for a in args], **kwargs))
        if not all(isinstance(part, Tensor) for part in parts):
            raise CallError(f"a {type(base).__name__} gives more than one tensor; its rows cannot be mixed.")
        return torch.cat(parts).index_select(0, torch.cat([index for _, index in groups]).argsort())

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        """Let a copy of an adapter's module stand in the original's place; the original is kept as it is."""
        names = self.to_merge(adapter_names)
        if not names:
            return
        trained = self.copies[names[-1]]
        if safe_merge and not all(finite(t) for t in trained.state_dict().values() if t.is_floating_point()):
            raise MergeError(f"adapter {names[-1]!r} holds NaN or Inf; nothing was changed.")
        if not self.merged:
            self._frozen.append(self.base)
        self._modules[self.names[0]] = copy.deepcopy(trained).requires_grad_(False)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the original module back."""
        if self._frozen:
            self._modules[self.names[0]] = self._frozen.pop()
        self.merged_adapters = []


class ModulesToSaveWrapper(Replacement):
    """A module named in `modules_to_save`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "original_module", "modules_to_save", on_disk=False)


def _batched(value: Any, count: int | None) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
