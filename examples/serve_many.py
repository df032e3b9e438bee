# SPDX-License-Identifier: Apache-2.0
"""A thousand adapters over one base, from disk: few stand in the model, some on the host, all can be asked for.

    python examples/serve_many.py [COUNT]

The base is small and made up, so that this runs anywhere. A batch has requests for popular adapters and for others.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graftlet import AdapterCache, AdapterPool, LoraConfig, get_peft_model

PLACES, ROWS, BATCHES = 16, 8, 50
CACHE = 4 * 2**20


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).eval()


def write_library(folder: Path, count: int) -> None:
    """Adapters of ranks 2 to 8, as training would leave them."""
    ranks = (2, 4, 8)
    models = {r: get_peft_model(base(), LoraConfig(r=r, target_modules=["q_proj", "v_proj"])) for r in ranks}
    for i in range(count):
        model = models[ranks[i % len(ranks)]]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        model.save_pretrained(folder / f"user-{i}")


def asked(count: int, chance: random.Random) -> list[str]:
    """A batch of requests: a few users ask often."""
    return [f"user-{min(int(chance.paretovariate(0.5)), count) - 1}" for _ in range(ROWS)]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        write_library(Path(folder), count)
        print(f"{count} adapters written in {time.perf_counter() - begun:.1f} s")
        model = get_peft_model(base(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        pool = AdapterPool(model, AdapterCache(CACHE, folder), places=PLACES)
        chance, served = random.Random(0), set[str]()
        batches = [asked(count, chance) for _ in range(BATCHES)]
        begun = time.perf_counter()
        for names, after in zip(batches, [*batches[1:], []], strict=True):
            with pool.rows(names) as rows, torch.no_grad():
                pool.cache.prefetch(after)  # read while this batch is computed
                model(input_ids=torch.randint(0, 256, (ROWS, 32)), adapter_names=rows)
            served.update(names)
        took = time.perf_counter() - begun
        print(
            f"{BATCHES * ROWS} requests for {len(served)} adapters in {took:.1f} s: {1000 * took / BATCHES:.0f} ms a batch"
        )
        print(f"host cache: {pool.cache.nbytes / 2**20:.1f} of {CACHE / 2**20:.0f} MiB, {len(pool.cache)} adapters")
        print(
            f"places in the model: {PLACES}; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
        )


if __name__ == "__main__":
    main()
