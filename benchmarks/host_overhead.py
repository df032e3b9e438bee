# SPDX-License-Identifier: Apache-2.0
"""What adapters cost the host: a 32-layer Llama of hidden size 64, all linear layers adapted, so that arithmetic hardly
counts. Graftlet and the reference in one process, alternating; medians and ratios.

    python benchmarks/host_overhead.py [RESULT.json]
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from many_adapters import LINEAR, compare, milliseconds
from transformers import LlamaConfig, LlamaForCausalLM

import graftlet


def base() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, ids = base(), torch.randint(0, 128, (2, 8))
    kinds = {"graftlet": graftlet, "reference": peft}
    made = {}

    def make(key: str) -> Any:
        library = kinds[key]
        return library.get_peft_model(copy.deepcopy(model), library.LoraConfig(r=8, target_modules=LINEAR))

    rows = [compare("get_peft_model, 224 layers", {k: lambda k=k: made.update({k: make(k)}) for k in kinds}, 3)]
    rows.append(compare("forward and backward", {k: lambda k=k: made[k](ids).logits.sum().backward() for k in kinds}))
    with torch.no_grad():
        plain = statistics.median(milliseconds(lambda: model(ids)) for _ in range(9))
        rows.append({**compare("forward", {k: lambda k=k: made[k](ids) for k in kinds}), "base": round(plain, 2)})
        for k in kinds:
            for name in "abcdefg":
                made[k].add_adapter(name, kinds[k].LoraConfig(r=8, target_modules=LINEAR))
        rows.append(compare("set_adapter, 8 adapters", {k: lambda k=k: made[k].set_adapter("c") for k in kinds}))
        for k in kinds:
            made[k].eval()
        mixed = torch.randint(0, 128, (8, 8))
        names = ["default", *"abcdefg"]
        rows.append(
            compare("mixed batch of 8 adapters", {k: lambda k=k: made[k](mixed, adapter_names=names) for k in kinds}, 5)
        )
        rows.append(
            compare(
                "merge and unmerge",
                {k: lambda k=k: (made[k].merge_adapter(), made[k].unmerge_adapter()) for k in kinds},
                5,
            )
        )
    result = {
        "torch": torch.__version__,
        "reference": peft.__version__,
        "python": platform.python_version(),
        "device": "cpu, 1 thread",
        "rows": rows,
    }
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
