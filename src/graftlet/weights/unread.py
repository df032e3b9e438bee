# SPDX-License-Identifier: Apache-2.0
"""Weights that stay in a file until they are asked for, so that a model of any size stands here without memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .storage import Storage


class Unread(nn.Parameter):
    """A parameter on meta that knows where its numbers are."""

    find: Callable[[], Tensor]

    @classmethod
    def of(cls, empty: Tensor, find: Callable[[], Tensor]) -> Unread:
        """What stands for a tensor on meta. find: reads its numbers, anew each time."""
        made = cls(empty.detach(), requires_grad=False)
        made.find = find
        return made


class UnreadStorage(Storage):
    """Plain tensors in a file: read as often as they are asked for, and never written."""

    backend = "unread"

    def read(self, module: nn.Module, name: str) -> Tensor:
        return found(getattr(module, name))

    def beside(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        return found(tensor)

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        return "it stands in a file; load the model to merge into it"


def found(tensor: Tensor) -> Tensor:
    """A tensor's numbers, wherever they are."""
    return tensor.find() if isinstance(tensor, Unread) else tensor


UNREAD = UnreadStorage()
