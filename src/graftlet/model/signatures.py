# SPDX-License-Identifier: Apache-2.0
"""What other libraries ask of a model by its signature, or of a folder before they load it."""

from __future__ import annotations

import inspect
import os
from types import MethodType
from typing import Any, Literal

from ..config import PeftConfig
from ..errors import ConfigError, GraftletError


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a repository on the hub, holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (GraftletError, OSError, ValueError):
        return False
    return True


def update_signature(model: Any, method: Literal["all", "forward", "generate"] = "all") -> None:
    """Give a `PeftModel`'s `forward`, `generate` or both the base model's signature and documentation."""
    if method not in ("all", "forward", "generate"):
        raise ConfigError(f"method={method!r}; allowed: 'all', 'forward', 'generate'.")
    for name in ("forward", "generate") if method == "all" else (method,):
        _take_over(model, name)


def update_forward_signature(model: Any) -> None:
    """`update_signature` for `forward`."""
    update_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """`update_signature` for `generate`."""
    update_signature(model, "generate")


def _take_over(model: Any, name: str) -> None:
    theirs = getattr(type(model.get_base_model()), name, None)
    own = getattr(type(model), name, None)
    if theirs is None or own is None:
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    call.__name__, call.__doc__ = name, theirs.__doc__
    call.__annotations__, call.__dict__["__signature__"] = theirs.__annotations__, inspect.signature(theirs)
    setattr(model, name, MethodType(call, model))
