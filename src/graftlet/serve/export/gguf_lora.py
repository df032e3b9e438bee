# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: one GGUF file of the kind `adapter`, each tensor under the name that llama.cpp gives the weight it changes.

The engine multiplies by alpha over the rank that it reads from the tensors, so alpha is the rank. Where a base's weights
are laid out otherwise in GGUF, so is the change: models of Llama's family have the rows of q and k in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import CallError, ConversionError, UnsupportedOptionError
from ...files import dropped_on_error, settle
from ...requirements import Requirement
from .plain import Pair, Plain
from .target import MERGE, Exported, Options, target

if TYPE_CHECKING:
    import numpy as np

NAME = "adapter.gguf"
NEEDS = Requirement("an export to GGUF", "gguf", ">=0.10")


@dataclass(frozen=True)
class Kind:
    """A family of models. architecture: llama.cpp's name. halves: the rows of q and k stand in its order."""

    architecture: str
    halves: bool = False


KINDS = {
    "llama": Kind("llama", halves=True), "mistral": Kind("llama", halves=True), "granite": Kind("granite", halves=True),
    "smollm3": Kind("smollm3", halves=True), "qwen2": Kind("qwen2"), "qwen3": Kind("qwen3"), "gemma": Kind("gemma"),
    "gemma2": Kind("gemma2"), "gemma3_text": Kind("gemma3"), "phi3": Kind("phi3"),
}  # fmt: skip
"""By transformers' `model_type`."""


@target("gguf-lora", asks_base=True)
def write(plain: Plain, out: Path, options: Options) -> Exported:
    """A file for `llama-cli --lora`."""
    NEEDS.check()
    base = options.base
    if base is None:
        raise CallError(
            "a GGUF adapter names its base's kind: give the base's config.json (base=..., or --base FOLDER)."
        )
    kind = _kind(base)
    tensors = dict(named for path, pair in plain.layers.items() for named in _tensors(path, pair, kind, base))
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    temporary = path.with_name(f".{NAME}.part")
    with dropped_on_error(temporary):
        _write(temporary, kind, plain.rank, tensors)
        settle(temporary, path)
    return Exported([path], f"llama-cli -m BASE.gguf --lora {path}", plain.rank, plain.lost)


def _kind(base: Mapping[str, Any]) -> Kind:
    kind = KINDS.get(str(base.get("model_type")))
    if kind is None:
        raise UnsupportedOptionError(
            f"a base of the model_type {base.get('model_type')!r} is not known here; known: {', '.join(KINDS)}. For others "
            "export to vllm, and run llama.cpp's convert_lora_to_gguf.py on that folder: it reads the right scale from it."
        )
    return kind


def _tensors(path: str, pair: Pair, kind: Kind, base: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    name = f"{_named(path, kind, base)}.weight"
    A, B = pair.A, pair.B
    if pair.embedding:
        A = A.T  # which llama.cpp looks its rows up in
    if kind.halves and path.endswith((".q_proj", ".k_proj")):
        heads = base["num_attention_heads"]
        B = _halves_apart(B, heads if path.endswith(".q_proj") else base.get("num_key_value_heads") or heads)
    return [(f"{name}.lora_a", A), (f"{name}.lora_b", B)]


def _named(path: str, kind: Kind, base: Mapping[str, Any]) -> str:
    import gguf

    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.architecture)
    name = gguf.get_tensor_name_map(number, base["num_hidden_layers"]).get_name(path)
    if name is None:
        raise ConversionError(
            f"llama.cpp has no weight for {path!r} in a model of the kind {kind.architecture}. {MERGE}"
        )
    if name == "output" and base.get("tie_word_embeddings"):
        raise ConversionError(
            f"the base's {path!r} is its embedding, and llama.cpp would leave its adapter out. {MERGE}"
        )
    return name


def _halves_apart(B: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order for rotary embeddings: those of the two halves of a head by turns."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(path: Path, kind: Kind, rank: int, tensors: Mapping[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, kind.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, _numbers(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _numbers(tensor: Tensor) -> np.ndarray:
    kept = torch.float16 if tensor.dtype == torch.float16 else torch.float32
    return tensor.detach().to("cpu", kept).contiguous().numpy()
