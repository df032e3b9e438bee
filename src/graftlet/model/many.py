# SPDX-License-Identifier: Apache-2.0
"""What `PeftModel` does with several adapters: which act for a call, their names, combining and merging them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core import lifecycle
from ..core.combine import Fit
from ..core.context import choosing, current
from ..core.host import check_known, check_name, home_of
from ..core.traffic import Traffic, changes
from ..core.tuner import BaseTuner
from ..errors import ConfigError
from . import prompting
from .parts import carry_context
from .prepare import plain

if TYPE_CHECKING:
    from ..config import PeftConfig


class ManyAdapters:
    """The part of `PeftModel` that is about several adapters."""

    if TYPE_CHECKING:
        _active: list[str]
        training: bool
        peft_type: object

        @property
        def tuner(self) -> BaseTuner | None: ...
        @property
        def peft_config(self) -> dict[str, PeftConfig]: ...
        def get_base_model(self) -> nn.Module: ...

    @property
    def traffic(self) -> Traffic:
        """Who calls the model, and who changes it."""
        return home_of(self.get_base_model()).traffic

    # which act

    @contextmanager
    def using(self, adapter_names: str | Sequence[str]) -> Iterator[None]:
        """Let these adapters act until the block ends: on this thread alone, whichever are active or merged.

        What learns stays as it is. Raises `AdapterNameError` for unknown names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known(names, list(self.peft_config))
        if self.tuner is not None and len(names) > 1:
            lifecycle.check_together(self.tuner.model, names)
        with self._choosing(tuple(names)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, until the block ends: on this thread, and no other."""
        with self._choosing(()):
            yield

    @contextmanager
    def _choosing(self, names: tuple[str, ...]) -> Iterator[None]:
        if self.training:
            carry_context(self)  # type: ignore[arg-type]
        with choosing(home_of(self.get_base_model()), names):
            yield

    def _chosen(self) -> tuple[str, ...] | None:
        """What `using` chose on this thread."""
        call = current()
        return None if call is None else call.choice(home_of(self.get_base_model()))

    @property
    def _prompt_off(self) -> bool:
        """Whether the base acts alone."""
        return self._chosen() == ()

    # their names, and what learns

    @changes
    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; all else stays as it is. Raises `AdapterNameError`."""
        check_known([old], list(self.peft_config))
        check_name(new, [n for n in self.peft_config if n != old])
        if self.tuner is None:
            prompting.rename(self, old, new)
        else:
            self.tuner.rename_adapter(old, new)
        self._active = [new if n == old else n for n in self._active]

    def freeze_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Let adapters not learn, whether they are active or not."""
        self.set_requires_grad(adapter_names, False)

    def unfreeze_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Let adapters learn, whether they are active or not."""
        self.set_requires_grad(adapter_names, True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters learn, or freeze them, whether they are active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known(names, list(self.peft_config))
        if self.tuner is None:
            prompting.set_requires_grad(self, names, requires_grad)
        else:
            lifecycle.set_requires_grad(self.tuner.shared_in[0], names, requires_grad)

    # one of several

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> dict[str, Fit]:
        """Make an adapter of others, weighted; `BaseTuner.add_weighted_adapter` has the arguments."""
        return self._layers("add_weighted_adapter").add_weighted_adapter(*args, **kwargs)

    def _layers(self, what: str) -> BaseTuner:
        if self.tuner is None:
            raise ConfigError(
                f"{what} is for methods on layers; {self.peft_type} changes no weight that it could go into."
            )
        return self.tuner

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Write the active (or named) adapters into the base weights. `unmerge_adapter` restores the weights' bits.

        Raises `MergeError`, every weight as it was, where a result is not finite or has no place.
        """
        self._layers("merge_adapter").merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Bring the base weights' very bits back."""
        self._layers("unmerge_adapter").unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """The base model with adapters merged in and no wrapper left.

        dequantize: give a model of ordinary layers for one of quantised ones, which rounding would cost a part of what
            the adapters do (`merge_errors`).
        """
        tuner = self._layers("merge_and_unload")
        merged = tuner.merge_and_unload(progressbar, safe_merge, adapter_names, dequantize)
        return plain(merged) if dequantize else merged

    def unload(self) -> nn.Module:
        """The base model without adapters and wrappers."""
        return self._layers("unload").unload()
