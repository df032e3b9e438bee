# SPDX-License-Identifier: Apache-2.0
"""vLLM: a folder in the adapter format itself, without what vLLM refuses or reads otherwise.

It reads `r`, `lora_alpha`, `target_modules`, `bias`, `use_rslora`, `use_dora` and `modules_to_save` of the config, and
takes keys that end in `lora_A.weight`, `lora_B.weight`, `lora_embedding_A` or `lora_embedding_B`. It does not read
`alpha_pattern`. llama.cpp's own converter and Ollama read the same folder, and the same scale from it.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ...methods.lora_config import plain as plain_config
from ...model import save
from ...pair import CONFIG, WEIGHTS
from .plain import Pair, Plain
from .target import Exported, Options, target

DEFAULT_RANK = 16
"""The largest rank that vLLM takes unless it is told."""


@target("vllm")
def write(plain: Plain, out: Path, options: Options) -> Exported:
    """A folder for `vllm serve --lora-modules`, and for llama.cpp's own converter."""
    config = plain_config(plain.config, dict.fromkeys(plain.layers, plain.rank), bias=False)
    config.modules_to_save = None
    if not isinstance(config.target_modules, (list, set)):  # a regex, which vLLM understands in one form alone
        config.target_modules = set(plain.layers)
    tensors = {f"base_model.model.{path}.{k}": t for path, pair in plain.layers.items() for k, t in named(pair).items()}
    save.save_adapter(out, save.saved_config(config), tensors)
    more = f" --max-lora-rank {_power(plain.rank)}" if plain.rank > DEFAULT_RANK else ""
    base = plain.config.base_model_name_or_path or "BASE"
    use = f"vllm serve {base} --enable-lora --lora-modules {re.sub(r'[^A-Za-z0-9_.-]', '-', out.name)}={out}{more}"
    return Exported([out / CONFIG, out / WEIGHTS], use, plain.rank, plain.lost)


def named(pair: Pair) -> dict[str, Tensor]:
    """A layer's tensors by their key in the adapter format."""
    if pair.embedding:
        return {"lora_embedding_A": pair.A, "lora_embedding_B": pair.B}
    found = {"lora_A.weight": pair.A, "lora_B.weight": pair.B}
    return found if pair.bias is None else {**found, "lora_B.bias": pair.bias}


def _power(rank: int) -> int:
    """The rank to allow: vLLM takes a few numbers only, 8, 16, 32 and so on."""
    return 1 << (rank - 1).bit_length()
