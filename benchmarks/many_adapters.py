# SPDX-License-Identifier: Apache-2.0
"""Many adapters in one model: adding, switching, merging, combining, and batches that mix them. Graftlet and the reference
in one process on the CPU, alternating; medians and ratios.

    python benchmarks/many_adapters.py [--only wide ...] [--out benchmarks/results] [--note "machine shared"]
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graftlet

KINDS = {"graftlet": graftlet, "reference": peft}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Work = Callable[[], Any]


def base(hidden: int, layers: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=4, **sizes)).to(dtype).eval()


def adapted(library: Any, model: nn.Module, names: list[str], r: int = 8) -> Any:
    """A model with adapters that do something."""
    made = library.get_peft_model(copy.deepcopy(model), config(library, r), names[0])
    for name in names[1:]:
        made.add_adapter(name, config(library, r))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            if "lora_" in name:
                scale = 0.01 if "lora_B" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.eval()


def config(library: Any, r: int = 8) -> Any:
    return library.LoraConfig(r=r, target_modules=LINEAR)


def milliseconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def compare(
    what: str, works: dict[str, Work], rounds: int = 7, between: dict[str, Work] | None = None
) -> dict[str, Any]:
    """Medians of alternating runs, and ours as a share of the reference's. between: undoes a run, and is not timed."""
    times: dict[str, list[float]] = {k: [] for k in works}
    for i in range(rounds + 1):
        for key, work in works.items():
            took = milliseconds(work)
            if between:
                between[key]()
            times[key] += [took] if i else []  # the first warms up
    row: dict[str, Any] = {"what": what, **{k: round(statistics.median(v), 3) for k, v in times.items()}}
    row["ratio"] = round(row["graftlet"] / row["reference"], 3)
    print(row, flush=True)
    return row


def switching(model: LlamaForCausalLM) -> list[dict[str, Any]]:
    rows = []
    for count in (2, 32):
        made = {k: adapted(lib, model, [f"a{i}" for i in range(count)]) for k, lib in KINDS.items()}
        turn = dict.fromkeys(KINDS, 0)

        def switch(key: str, made: dict[str, Any] = made, turn: dict[str, int] = turn) -> None:
            turn[key] ^= 1
            made[key].set_adapter(f"a{turn[key]}")

        rows.append(compare(f"set_adapter, {count} adapters, 112 layers", {k: lambda k=k: switch(k) for k in KINDS}))
        rows.append(
            compare(
                f"add_adapter beside {count}",
                {k: lambda k=k, made=made: made[k].add_adapter("new", config(KINDS[k])) for k in KINDS},
                between={k: lambda k=k, made=made: made[k].delete_adapter("new") for k in KINDS},
            )
        )
    return rows


def mixing(model: LlamaForCausalLM) -> list[dict[str, Any]]:
    made = {k: adapted(lib, model, [f"a{i}" for i in range(32)]) for k, lib in KINDS.items()}
    ids = torch.randint(0, 128, (32, 8), generator=torch.Generator().manual_seed(2))
    rows = []
    for count in (1, 4, 32):
        names = [f"a{i % count}" for i in range(32)]
        with torch.no_grad():
            outputs = {k: m(ids, adapter_names=names).logits for k, m in made.items()}
            apart = float((outputs["graftlet"] - outputs["reference"]).abs().max())
            assert apart < 1e-3, apart
            works = {k: lambda k=k, names=names: made[k](ids, adapter_names=names) for k in KINDS}
            rows.append(compare(f"a batch of 32 rows, {count} adapters", works, 3))
    return rows


def merging(dtype: torch.dtype) -> list[dict[str, Any]]:
    name = str(dtype).removeprefix("torch.")
    made = {k: adapted(lib, base(512, 4, dtype), ["a"], r=16) for k, lib in KINDS.items()}
    before = {k: weights(m) for k, m in made.items()}
    merge = compare(
        f"merge_adapter, {name}, 28 layers of 512",
        {k: lambda k=k: made[k].merge_adapter() for k in KINDS},
        between={k: lambda k=k: made[k].unmerge_adapter() for k in KINDS},
    )
    merge["weights changed after 8 cycles"] = {
        k: round(sum(int((before[k][n] != t).sum()) for n, t in weights(m).items()) / size(m), 4)
        for k, m in made.items()
    }
    for m in made.values():
        m.merge_adapter()
    unmerge = compare(
        f"unmerge_adapter, {name}",
        {k: lambda k=k: made[k].unmerge_adapter() for k in KINDS},
        between={k: lambda k=k: made[k].merge_adapter() for k in KINDS},
    )
    return [merge, unmerge]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}


def size(model: Any) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "base_layer.weight" in n)


def combining() -> list[dict[str, Any]]:
    made = {k: adapted(lib, base(512, 2), ["a", "b"], r=16) for k, lib in KINDS.items()}
    rows = []
    for kind in ("svd", "linear", "cat"):
        rows.append(
            compare(
                f"add_weighted_adapter {kind!r}, 14 layers of 512, rank 16",
                {
                    k: lambda k=k, kind=kind: made[k].add_weighted_adapter(["a", "b"], [0.7, 0.3], "s", kind)
                    for k in KINDS
                },
                rounds=3,
                between={k: lambda k=k: made[k].delete_adapter("s") for k in KINDS},
            )
        )
    return rows


def wide() -> list[dict[str, Any]]:
    """At the size of Llama-8B's attention. The reference takes a minute a layer or more, and so runs once."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict((name, nn.Linear(4096, 4096, bias=False)) for name in ("q_proj", "o_proj")))
    made = {k: adapted(lib, model, ["a", "b", "c"], r=64) for k, lib in KINDS.items()}

    def combine(key: str) -> float:
        return milliseconds(lambda: made[key].add_weighted_adapter(["a", "b", "c"], [0.5, 0.3, 0.2], "s", "svd"))

    ours = []
    for _ in range(6):  # the first warms up
        ours.append(combine("graftlet"))
        made["graftlet"].delete_adapter("s")
    combine("graftlet")
    took = {"graftlet": round(statistics.median(ours[1:]), 3), "reference": round(combine("reference"), 3)}
    row = {"what": "add_weighted_adapter 'svd', 2 layers of 4,096, 3 adapters of rank 64", **took}
    row["ratio"] = round(took["graftlet"] / took["reference"], 6)
    row["apart"] = max(apart(made["graftlet"], made["reference"], name) for name in ("q_proj", "o_proj"))
    assert row["apart"] < 1e-4, row
    print(row, flush=True)
    return [row]


@torch.no_grad()
def apart(one: Any, other: Any, name: str) -> float:
    """How far two libraries' combined changes of a layer are apart, as a share of them."""
    changes = []
    for model in (one, other):
        layer = model.base_model.model.get_submodule(name)
        changes.append(layer.lora_B["s"].weight @ layer.lora_A["s"].weight * layer.scaling["s"])
    return float((changes[0] - changes[1]).norm() / changes[1].norm())


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "switching": lambda: switching(base(64, 16)),
    "mixing": lambda: mixing(base(64, 16)),
    "merging": lambda: merging(torch.float32) + merging(torch.bfloat16),
    "combining": combining,
    "wide": wide,
}


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Many adapters, {result['date']}",
        "",
        f"Graftlet {result['graftlet']} beside PEFT {result['reference']}; torch {result['torch']}, "
        f"Python {result['python']}, {result['device']}. {result['note']}",
        "",
        "| what | Graftlet, ms | PEFT, ms | ratio |",
        "|---|---:|---:|---:|",
        *(f"| {r['what']} | {r['graftlet']:g} | {r['reference']:g} | {r['ratio']:g} |" for r in result["rows"]),
        "",
    ]
    drift = [r for r in result["rows"] if "weights changed after 8 cycles" in r]
    for row in drift:
        share = row["weights changed after 8 cycles"]
        lines.append(
            f"- {row['what'].split(', ')[1]}: after 8 cycles of merging and unmerging {share['reference']:.2%} of the weights "
            f"differ from what they were (PEFT), {share['graftlet']:.2%} (Graftlet)."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    rows = [row for part in wanted.only for row in PARTS[part]()]
    result = {
        "date": datetime.date.today().isoformat(),
        "graftlet": graftlet.__version__,
        "reference": peft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"CPU, {threads} threads",
        "note": wanted.note,
        "rows": rows,
    }
    if wanted.out is not None:
        wanted.out.mkdir(parents=True, exist_ok=True)
        name = f"many-adapters-{result['date']}"
        (wanted.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (wanted.out / f"{name}.md").write_text(page(result))


if __name__ == "__main__":
    main()
