# SPDX-License-Identifier: Apache-2.0
"""mlx-lm: `adapters.safetensors` with `lora_a` `[in, r]` and `lora_b` `[r, out]`, and a config of its own.

Its one rank and one scale hold for all layers. `keys` names what is adapted: in each block by the path below the block,
elsewhere by the whole path.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor

from ...files import write_atomically
from ...model.save import save_tensors
from .plain import Pair, Plain
from .target import Exported, Options, target

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@target("mlx")
def write(plain: Plain, out: Path, options: Options) -> Exported:
    """A folder for `mlx_lm.generate --adapter-path`."""
    settings = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all
        "lora_parameters": {
            "rank": plain.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({_key(p) for p in plain.layers}),
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"{path}.{name}": t for path, pair in plain.layers.items() for name, t in _named(pair).items()}
    save_tensors(tensors, out / WEIGHTS)
    write_atomically(out / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
    base = plain.config.base_model_name_or_path or "BASE"
    return Exported(
        [out / CONFIG, out / WEIGHTS], f"mlx_lm.generate --model {base} --adapter-path {out}", plain.rank, plain.lost
    )


def _named(pair: Pair) -> dict[str, Tensor]:
    return {"lora_a": pair.A.T.contiguous(), "lora_b": pair.B.T.contiguous()}


def _key(path: str) -> str:
    """A layer's path below its block, `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    return re.sub(r"^.*?\.layers\.\d+\.", "", path)
