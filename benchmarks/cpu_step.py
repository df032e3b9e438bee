# SPDX-License-Identifier: Apache-2.0
"""A LoRA step on a CPU: a model of SmolLM2-135M's shape in float32, batch 4 x 128, forward, backward and AdamW; Graftlet, with
`optimize_model` and without, and the reference in processes of their own, alternating. Medians of the step's time, and the
least; the least time that the processor worked for one (other work on the machine is not in it, but for what it takes of the
caches), the part of it that products are, and the most memory that each process has held.

    python benchmarks/cpu_step.py [--threads 2] [--rounds 3] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "LoRA r=16": {},
    "LoRA r=16, dropout 0.05": {"lora_dropout": 0.05},
    "DoRA r=16": {"use_dora": True},
    "LoRA r=16, checkpointing": {"checkpointing": True},
}
WARMUPS, STEPS = 2, 6
LIBRARIES = {"graftlet": "graftlet", "optimised": "graftlet", "reference": "peft"}


def run(who: str, case: str, threads: int) -> dict[str, float]:
    """In a process of its own: the step in milliseconds, and MB held before the steps and at most."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    library = importlib.import_module(LIBRARIES[who])
    fields = dict(CASES[case])
    checkpointing = fields.pop("checkpointing", False)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    base = LlamaForCausalLM(config).train()
    base.config.use_cache = False
    model = library.get_peft_model(base, library.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **fields))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if who == "optimised":
        library.optimize_model(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 49152, (4, 128))
    times, worked, before = [], [], held()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    for _ in range(WARMUPS + STEPS):
        start, busy = time.perf_counter(), time.process_time()
        step()
        times.append(1000 * (time.perf_counter() - start))
        worked.append(1000 * (time.process_time() - busy))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    took = {"ms": statistics.median(times[WARMUPS:]), "least": min(times[WARMUPS:]), "busy": min(worked[WARMUPS:])}
    return {**took, "before": before, "peak": peak, "products": products(step)}


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def products(step: Callable[[], None]) -> float:
    """The share of a step's operations, by time, that matrix products are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as told:
        step()
    own = {event.key: event.self_cpu_time_total for event in told.key_averages()}
    return sum(own.get(name, 0.0) for name in PRODUCTS) / sum(own.values())


def held() -> float:
    """MB that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


KEYS: dict[str, Any] = {
    "ms": statistics.median,
    "least": min,
    "busy": min,
    "products": statistics.median,
    "before": statistics.median,
    "peak": statistics.median,
    "step's own": statistics.median,
}
"""What is told of each, and how it comes from several runs. Times in milliseconds, memory in MB."""


def compared(case: str, threads: int, rounds: int) -> dict[str, Any]:
    """All of them, one after another, several times."""
    found: dict[str, list[dict[str, float]]] = {who: [] for who in LIBRARIES}
    for _ in range(rounds):
        for who in LIBRARIES:
            command = [sys.executable, __file__, "--who", who, "--case", case, "--threads", str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[who].append(json.loads(done.stdout.splitlines()[-1]))
    for runs in found.values():
        for one in runs:
            one["step's own"] = one["peak"] - one["before"]
    row: dict[str, Any] = {"what": case}
    for key, of in KEYS.items():
        middle = {who: of(r[key] for r in runs) for who, runs in found.items()}
        row[key] = {who: round(value, 3 if value < 1 else 1) for who, value in middle.items()}
        if key != "products":
            row[key]["ratio"] = round(middle["graftlet"] / middle["reference"], 3)
            row[key]["ratio, optimised"] = round(middle["optimised"] / middle["reference"], 3)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", choices=list(LIBRARIES))
    parser.add_argument("--case", choices=list(CASES), default="LoRA r=16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.who:
        print(json.dumps(run(given.who, given.case, given.threads)))
        return
    import peft
    import torch

    import graftlet

    result = {
        "date": datetime.date.today().isoformat(),
        "graftlet": graftlet.__version__,
        "reference": peft.__version__,
        "torch": torch.__version__,
        "device": f"CPU, {given.threads} threads, {platform.machine()}",
        "rows": [compared(case, given.threads, given.rounds) for case in CASES],
    }
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "cpu-step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
