# SPDX-License-Identifier: Apache-2.0
"""What a method on whole blocks is: a call around each of them, and maybe one around the whole model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import PeftConfig
from .method import Spec


@dataclass(frozen=True)
class Held:
    """One adapter on one block.

    tensors: by their names. number: the block's place among those of the adapter. training: the block is in training mode.
    configs: of all adapters of the block. networks: what they have beside the model (`Block.networks`), by name and adapter.
    """

    adapter: str
    tensors: Mapping[str, Tensor]
    configs: Mapping[str, Any]
    number: int = 0
    training: bool = False
    networks: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def config(self) -> Any:
        """The adapter's config."""
        return self.configs[self.adapter]

    def network(self, name: str) -> nn.Module | None:
        """The adapter's network of this name; None where it has none."""
        held = self.networks.get(name, {})
        return held[self.adapter] if self.adapter in held else None  # noqa: SIM401  a Box is no dict


class Block:
    """A call around a whole block, such as an attention layer. A subclass gives `params`, `init` and `call`.

    boxed: its targets and tensors are written as those of layers are: names or a regex, and keys with the adapter's name;
        in single precision on blocks of less. Otherwise there is one name for all blocks, and no level for the adapter.
    controls: functions of the method that the model has while such an adapter is on it; what the active adapter holds on
        one of its blocks comes first, then the model.
    """

    law: ClassVar[str] = "one"
    unmergeable: ClassVar[str | None] = "it changes no weight"
    exact_start: ClassVar[bool] = True
    boxed: ClassVar[bool] = False
    controls: ClassVar[tuple[str, ...]] = ()

    def complete(self, config: PeftConfig, model: nn.Module) -> None:
        """Fill what the config leaves to the model it is put into."""

    def choose(self, paths: list[str], config: PeftConfig) -> list[str]:
        """Of the blocks that the targets match, in order, those to adapt."""
        return paths

    def params(self, block: nn.Module, config: PeftConfig, model: nn.Module) -> dict[str, Spec]:
        """An adapter's tensors on a block. Raises `UnsupportedLayerError` for a block that is not known."""
        raise NotImplementedError

    def init(self, tensors: dict[str, Tensor], config: PeftConfig) -> None:
        """Fill the tensors in place."""
        raise NotImplementedError

    def networks(self, config: PeftConfig, model: nn.Module, init: bool) -> dict[str, nn.Module]:
        """Modules of the adapter's own beside the model, by name: they learn with it, unless frozen, and stand in its file.

        init: start them; otherwise their shapes are enough, as the file has the rest.
        """
        return {}

    def call(self, p: Held, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The adapted block's output."""
        raise NotImplementedError

    def around(self, p: Held, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a call of the whole model, for a method that begins or ends something there.

        What its blocks hand on to each other stands in the call's context (`Call.trail`). `p` is of the first of them.
        """
        return model(*args, **kwargs)


def surrounds(method: type) -> bool:
    """Whether a method has to do with a call of the whole model."""
    return issubclass(method, Block) and method.around is not Block.around
