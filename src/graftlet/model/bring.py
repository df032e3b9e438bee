# SPDX-License-Identifier: Apache-2.0
"""Adapters that work with others: those are loaded with them, and taken out with them where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import PeftConfig
from ..core import lifecycle
from ..core.tuner import Before


@contextmanager
def brought(model: Any, config: PeftConfig, widen: bool) -> Iterator[None]:
    """The adapters that a config brings, loaded where they are not there; without them again on an error."""
    there, before = list(model.peft_config), Before(model.get_base_model())
    try:
        for name, source in config.brings.items():
            if name not in there:
                model.load_adapter(source, name, autocast_adapter_dtype=widen)
        yield
    except BaseException:
        new = [name for name in model.peft_config if name not in there]
        for name in new if there else ():
            model.delete_adapter(name)
        if new and not there:
            lifecycle.unload(model.get_base_model())
        before.restore()
        raise


def lead(model: Any, name: str) -> None:
    """Make an adapter that brings others the active one, and let them learn along if it says so."""
    config = model.peft_config[name]
    if config.brings:
        model.set_adapter(name, config.inference_mode)
        if config.teaches and not config.inference_mode:
            model.set_requires_grad(list(config.brings), True)
