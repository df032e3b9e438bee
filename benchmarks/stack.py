# SPDX-License-Identifier: Apache-2.0
"""Every method that adapts linear layers, on one stack of them, Graftlet and the reference in one run: putting it in, a
forward pass without gradients, a training step (forward and backward), merging.

    python benchmarks/stack.py [--only LORA,OFT] [--out benchmarks/results] [--minutes 9]

On a GPU: six layers of 4,096 in bf16, 4,096 tokens; on a CPU: four of 1,024 in float32, 256 tokens. Medians of alternating
runs. Each method has the config's defaults but for what `SETTINGS` names. Where both libraries have the same outputs from
the same tensors is tested elsewhere (`tests/oracle`); here each keeps what it starts with.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import graftlet
from graftlet.registry import Entry, entries
from graftlet.weights.site import Linear

LIBRARIES = {"graftlet": graftlet, "reference": peft}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, WIDTH, TOKENS, DTYPE = (6, 4096, 4096, torch.bfloat16) if DEVICE == "cuda" else (4, 1024, 256, torch.float32)
ROUNDS, MOST = 5, 30
"""At the least and at the most, of what takes little time: of a short one a busy host makes a long one."""
ENOUGH = 1.0
"""Seconds, after which the least will do."""
SLOW = 4.0
"""Seconds. What takes longer is measured once."""

SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 12, "target_r": 8, "total_step": 1000},
    "ADAMSS": {"r": 32, "num_subspaces": 4},
    "IA3": {"feedforward_modules": []},
    "LORA": {"r": 16},
    "OSF": {"effective_rank": WIDTH // 2},
    "VBLORA": {"num_vectors": 90, "vector_length": 256},
}
"""What the defaults are not meant for on these layers."""

LEFT_OUT = {"XLORA": "it mixes trained adapters", "TRAINABLE_TOKENS": "it adapts rows of a look-up"}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"DoRA": ("LORA", {"r": 16, "use_dora": True})}
"""Settings with a row of their own: the method, and its fields."""

Row = dict[str, Any]
Work = Callable[[], Any]


class Block(nn.Module):
    """A layer beside a short cut, so that many of them keep their numbers in bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.l = nn.Linear(WIDTH, WIDTH, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l(self.norm(x))


def stack() -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return nn.Sequential(*(Block() for _ in range(LAYERS))).to(DTYPE)


def adapted(library: Any, config: str, fields: dict[str, Any], model: nn.Module) -> Any:
    """A model whose adapter has been trained a little, so that it does something."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(model, getattr(library, config)(target_modules=["l"], **fields))


def filled(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def waited() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(work: Work) -> float:
    start = waited()
    work()
    return 1000 * (waited() - start)


class Runs:
    """One library's model and what is measured on it."""

    def __init__(self, library: Any, config: str, fields: dict[str, Any], x: Tensor) -> None:
        model = stack()
        self.x = x
        start = waited()
        self.model = adapted(library, config, fields, model)
        self.inject = 1000 * (waited() - start)
        filled(self.model)
        self.learning = [p for p in self.model.parameters() if p.requires_grad]

    def forward(self) -> None:
        self.model.eval()
        with torch.inference_mode():
            self.model(self.x)

    def step(self) -> None:
        self.model.train()
        self.model(self.x).float().square().mean().backward()
        for parameter in self.learning:
            parameter.grad = None

    def merge(self) -> None:
        self.model.merge_adapter()

    def busy(self) -> float:
        """Milliseconds that the device works for a step, whatever the host does meanwhile."""
        if DEVICE == "cpu":
            return 0.0
        with profile(activities=[ProfilerActivity.CUDA]) as told:
            self.step()
            torch.cuda.synchronize()
        return round(sum(event.self_device_time_total for event in told.key_averages()) / 1000, 3)

    def peak(self) -> float:
        """GB that a step takes beside what is held before it."""
        if DEVICE == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        self.step()
        return round((torch.cuda.max_memory_allocated() - held) / 1e9, 3)


def measured(runs: dict[str, Runs], what: str, after: Callable[[Runs], Any] | None = None) -> dict[str, float]:
    """Medians of alternating runs in milliseconds; a library that cannot do it has none."""
    times: dict[str, list[float]] = {who: [] for who in runs}
    failed: set[str] = set()
    gc.collect()
    start = time.monotonic()
    for i in range(MOST + 1):
        if i > ROUNDS and time.monotonic() - start > ENOUGH:
            break
        for who, run in runs.items():
            if who in failed or (i > 1 and times[who][0] > 1000 * SLOW):
                continue
            try:
                took = milliseconds(getattr(run, what))
                if after is not None:
                    after(run)
            except Exception as error:
                print(f"    {who} has no {what}: {str(error).splitlines()[0][:120] if str(error) else type(error)}")
                failed.add(who)
                continue
            times[who] += [took] if i else []  # the first warms up
    return {who: round(statistics.median(t), 3) for who, t in times.items() if t and who not in failed}


def row(name: str, config: str, fields: dict[str, Any]) -> Row:
    """What one method takes in both libraries."""
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=DTYPE)
    runs: dict[str, Runs] = {}
    for who, library in LIBRARIES.items():
        try:
            runs[who] = Runs(library, config, fields, x)
        except Exception as error:
            print(f"    {who} cannot: {str(error).splitlines()[0][:140] if str(error) else type(error)}", flush=True)
    found: Row = {"method": name, "fields": fields, "inject": {w: round(r.inject, 1) for w, r in runs.items()}}
    found["forward"] = measured(runs, "forward")
    found["step"] = measured(runs, "step")
    found["busy"] = {who: run.busy() for who, run in runs.items() if who in found["step"]}
    found["GB"] = {who: run.peak() for who, run in runs.items() if who in found["step"]}
    found["merge"] = measured(runs, "merge", lambda run: run.model.unmerge_adapter())
    return found


def wanted(only: list[str]) -> list[tuple[str, Entry, dict[str, Any]]]:
    known = {e.name: e for e in entries() if any(issubclass(Linear, s) for s in e.sites) and e.name not in LEFT_OUT}
    rows = [(name, entry, SETTINGS.get(name, {})) for name, entry in known.items()]
    rows += [(name, known[of], fields) for name, (of, fields) in VARIANTS.items()]
    return [r for r in rows if not only or r[0] in only]


COLUMNS = {
    "inject": "put in",
    "forward": "forward",
    "step": "step",
    "busy": "step, the device",
    "GB": "step's memory, GB",
    "merge": "merge",
}
"""What is told of a method, and how a page calls it."""


def ratio(found: Row, what: str) -> str:
    """Ours as a share of the reference's, with both times."""
    ours, theirs = (found.get(what, {}).get(who) for who in LIBRARIES)
    if ours is None:
        return "none"
    return f"{ours:.3g} (alone)" if not theirs else f"{ours:.3g} / {theirs:.3g} = {ours / theirs:.2f}"


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# One stack of layers, {result['date']}",
        "",
        f"{result['shape']}. Graftlet {result['graftlet']} / PEFT {result['reference']}, milliseconds, and the ratio; torch "
        f"{result['torch']}, {result['device']}.{' ' + result['note'] if result['note'] else ''}",
        "",
        f"| method | {' | '.join(COLUMNS.values())} |",
        "|---" * (1 + len(COLUMNS)) + "|",
        *(f"| {r['method']} | {' | '.join(ratio(r, what) for what in COLUMNS)} |" for r in result["rows"]),
        "",
        "Times of steps are the clock's, a host's among them; of a step, what the device works is told beside.",
        "",
        "PEFT merges without a check and cannot bring the weights' bits back; Graftlet checks each merge and can.",
    ]
    return "\n".join(lines) + "\n"


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    importlib.import_module("transformers")  # before anything is timed
    started, rows = time.monotonic(), []
    for name, entry, fields in wanted([n for n in given.only.split(",") if n]):
        if time.monotonic() - started > 60 * given.minutes:
            print(f"no time for {name}")
            continue
        found = row(name, entry.config.__name__, copy.deepcopy(fields))
        rows.append(found)
        print(name, *(f"{what} {ratio(found, what)}" for what in COLUMNS), sep="; ")
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    result = {
        "date": datetime.date.today().isoformat(),
        "graftlet": graftlet.__version__,
        "reference": peft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device(),
        "shape": f"{LAYERS} layers of {WIDTH} x {WIDTH}, {str(DTYPE).removeprefix('torch.')}, {TOKENS} tokens",
        "note": given.note,
        "rows": rows,
    }
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"stack-{DEVICE}.json").write_text(json.dumps(result, indent=1) + "\n")
        (given.out / f"stack-{DEVICE}.md").write_text(page(result))


if __name__ == "__main__":
    main()
