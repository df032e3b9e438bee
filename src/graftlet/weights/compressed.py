# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: an ordinary linear layer whose weight may be packed, by any of the package's formats.

Its class says nothing, so it is known by the scheme that it carries. A model that was loaded packed is unpacked as it is
first called, and then computes with the wide weight as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from .storage import Packed, Storage


class Compressed(Packed):
    """A layer with a `quantization_scheme`. While it is packed it has no tensor called `weight`."""

    backend = "compressed-tensors"

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        return next(t for t in (module._parameters.get(name), *module.parameters(), *module.buffers()) if t is not None)

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size([module.out_features, module.in_features])  # type: ignore[list-item]

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        kinds = [t.dtype for t in module.parameters() if t.is_floating_point() and t.itemsize > 1]
        return kinds[0] if kinds else torch.bfloat16

    def unwritable(self, module: nn.Module, name: str) -> str | None:
        if not _packed(module):
            return None
        return (
            "compressed-tensors unpacks a model as it is first called, and its weights can be merged into from then on; "
            "call the model once, or merge with dequantize=True"
        )

    @torch.no_grad()
    def read(self, module: nn.Module, name: str) -> Tensor:
        if not _packed(module):
            return getattr(module, name)
        scheme: Any = module.quantization_scheme
        form: Any = BaseCompressor.get_value_from_registry(scheme.format)
        held = {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()]}
        return form.decompress(held, scheme)["weight"].to(self.dtype(module, name))

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        getattr(module, name).copy_(value)

    def allowed(self, module: nn.Module, name: str, meant: Tensor) -> Tensor:
        return Storage.allowed(self, module, name, meant)

    def save(self, module: nn.Module, name: str) -> Tensor | None:
        return None if _packed(module) else getattr(module, name).detach().clone()

    @torch.no_grad()
    def restore(self, module: nn.Module, name: str, saved: Tensor | None) -> None:
        if saved is not None:
            getattr(module, name).copy_(saved)

    def recall(self, module: nn.Module, name: str, saved: Tensor | None) -> Tensor:
        return self.read(module, name) if saved is None else saved


COMPRESSED = Compressed()


def _packed(module: nn.Module) -> bool:
    status: Any = getattr(module, "quantization_status", None)
    return status is not None and status.value == "compressed"
