# SPDX-License-Identifier: Apache-2.0
"""What `graftlet plan` foretells beside what is measured: peak memory of training steps on the CPU, and on one GPU.

    python benchmarks/plan.py                 # the CPU cases, each in a process of its own -> benchmarks/results/plan.json
    python benchmarks/plan.py --gpu           # cases on a GPU besides, where there is one
    python benchmarks/plan.py --table         # docs/guides/plan.md's tables anew, from the results

Measured on the CPU is what torch allocates, from its profiler's record of every allocation: kernels' own scratch is in
it, and it is the same in every run. The process's resident memory is told beside it, and is no measure: it has the
interpreter, the libraries' code, and whatever the C library keeps of what was freed.
The figures of `training-step.json`, `quantised-gpu.json` and `stack-cuda.json`, which other scripts measure on a GPU, are
compared as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import re
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType

import graftlet
from graftlet.core.kernel import rehearsal
from graftlet.knowledge.cost.attention import Operations
from graftlet.knowledge.cost.ledger import Ledger, parts_of
from graftlet.knowledge.cost.step import backward

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "plan.json"
GUIDE = HERE.parent / "docs" / "guides" / "plan.md"

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "pad_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "vocab_size": 4096,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 4096,
}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}
GEMMA = {**LLAMA, "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64}
ALL = {"target_modules": "all-linear"}
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 8, **ALL}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "LoRA r8": (LLAMA, LORA, {}),
    "LoRA r8, checkpointing": (LLAMA, LORA, {"checkpointing": True}),
    "LoRA r8, dropout 0.1": (LLAMA, {**LORA, "lora_dropout": 0.1}, {}),
    "LoRA r8, padded rows": (LLAMA, LORA, {"padding": True}),
    "LoRA r8, bfloat16 base": (LLAMA, LORA, {"dtype": "bfloat16"}),
    "LoRA r8, two batches a step": (LLAMA, LORA, {"accumulation": 2}),
    "LoRA r8, one long row": (LLAMA, LORA, {"batch": 1, "sequence": 1024}),
    "LoRA r64, SGD": (LLAMA, {**LORA, "r": 64}, {"optimiser": "sgd"}),
    "LoRA r8, 4 bits": (LLAMA, LORA, {"quantisation": "nf4", "dtype": "bfloat16"}),
    "DoRA r8": (LLAMA, {**LORA, "use_dora": True}, {}),
    "head trained along": (LLAMA, {**LORA, "modules_to_save": ["lm_head"]}, {}),
    "HRA r8": (LLAMA, {"peft_type": "HRA", "r": 8, **ALL}, {}),
    "IA3": (LLAMA, {"peft_type": "IA3"}, {}),
    "OFT, blocks of 32": (LLAMA, {"peft_type": "OFT", "oft_block_size": 32, "target_modules": ["q_proj", "v_proj"]}, {}),
    "LoKr r8": (LLAMA, {"peft_type": "LOKR", "r": 8, "target_modules": ["q_proj", "v_proj"]}, {}),
    "prompt of 20 tokens": (LLAMA, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}, {}),
    "prefix of 20 tokens": (LLAMA, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}, {}),
    "full fine-tuning": (LLAMA, None, {}),
    "GPT-2, LoRA r8": (GPT2, LORA, {}),
    "BERT classifier, LoRA r8": (BERT, {**LORA, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, {}),
    "Qwen3, LoRA r8": (QWEN, LORA, {}),
    "Gemma 3, LoRA r8": (GEMMA, LORA, {}),
}  # fmt: skip
"""A model's config, an adapter's (None: all of the model learns), and how it is trained."""


def adapter(values: dict[str, Any] | None) -> Any:
    return None if values is None else graftlet.PeftConfig.from_dict(values)


def settings(case: str, device: str = "cpu") -> tuple[dict[str, Any], Any, dict[str, Any]]:
    model, values, how = CASES[case]
    return model, adapter(values), {"batch": 4, "sequence": 256, "device": device, **how}


# measuring


def build(model: dict[str, Any], config: Any, how: dict[str, Any], device: str) -> Any:
    """The model as a user makes it."""
    from graftlet.knowledge.cost.setup import HEADS, model_config

    task = (config.task_type if config is not None else None) or "CAUSAL_LM"
    known = {"dtype": getattr(torch, how.get("dtype", "float32"))}
    made: Any = getattr(transformers, HEADS[str(task)]).from_config(model_config(model), **known).to(device)
    made.config.use_cache = False
    if config is not None:
        made.requires_grad_(False)
        if how.get("quantisation"):
            four_bits(made, device)
            graftlet.prepare_model_for_kbit_training(made, use_gradient_checkpointing=False)
        made = graftlet.get_peft_model(made, config)
    if how.get("checkpointing"):
        made.gradient_checkpointing_enable({"use_reentrant": False})
        if config is not None:
            made.enable_input_require_grads()
    if how.get("optimised"):
        graftlet.optimize_model(made)
    return made.train()


def four_bits(model: Any, device: str) -> None:
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                sizes = child.in_features, child.out_features
                packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=child.weight.dtype, quant_type="nf4")
                packed.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
                ).to(device)
                setattr(parent, name, packed)
    model.is_loaded_in_4bit = True


def inputs(model: dict[str, Any], config: Any, how: dict[str, Any], device: str) -> dict[str, torch.Tensor]:
    size = how["batch"], how["sequence"]
    ids = torch.randint(1, model["vocab_size"], size, device=device)
    classes = config is not None and str(config.task_type) == "SEQ_CLS"
    found = {"input_ids": ids, "labels": torch.zeros(size[0], dtype=torch.long, device=device) if classes else ids}
    if how.get("padding"):
        mask = torch.ones(size, dtype=torch.long, device=device)
        mask[0, : size[1] // 2] = 0
        found["attention_mask"] = mask
    return found


def optimiser(made: Any, how: dict[str, Any], device: str) -> torch.optim.Optimizer:
    learning = [p for p in made.parameters() if p.requires_grad]
    if how.get("optimiser") == "sgd":
        return torch.optim.SGD(learning, 1e-4)
    return torch.optim.AdamW(learning, 1e-4, foreach=device == "cuda")


def stepping(
    made: Any, opt: torch.optim.Optimizer, batch: dict[str, torch.Tensor], how: dict[str, Any]
) -> Callable[[], None]:
    def step() -> None:
        for _ in range(how.get("accumulation", 1)):
            made(**batch).loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


def allocated(steps: Callable[[], Any]) -> tuple[int, Any]:
    """The most that torch held on the CPU at once while something ran, and what that gave."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        result = steps()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most, result


def measure(case: str, device: str) -> dict[str, Any]:
    """One case's peak: made, and two steps taken."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, config, how = settings(case, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run() -> Callable[[], None]:
        made = build(model, config, how, device)
        step = stepping(made, optimiser(made, how, device), inputs(model, config, how, device), how)
        for _ in range(2):
            step()
        return step

    if device == "cuda":
        step = run()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak, resident = torch.cuda.max_memory_allocated(), 0
    else:
        peak, step = allocated(run)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"measured": peak, "resident": resident}


def foretold(case: str, device: str) -> dict[str, Any]:
    model, config, how = settings(case, device)
    found = graftlet.estimate(model, config, **{"dtype": "float32", **how})
    parts = {k: v for k, v in vars(found.memory).items() if k != "phase"}
    return {"predicted": found.peak, "predicted_seconds": found.time.likely, "trainable": found.trainable, **parts}


def row(case: str, device: str) -> dict[str, Any]:
    """One case in a process of its own, so that nothing of another is in it; a fork of this one hangs in the profiler."""
    kind = multiprocessing.get_context("spawn")
    ours, theirs = kind.Pipe(duplex=False)
    child = kind.Process(target=_told, args=(theirs, case, device))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{case}: the process ended without a result") from None
    finally:
        child.join()


def _told(pipe: Any, case: str, device: str) -> None:
    pipe.send(measure(case, device))
    pipe.close()


# what other scripts measured on a GPU

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EIGHT_BILLION = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
STEP = {"batch": 2, "sequence": 2048, "optimiser": "adamw_fused", "dtype": "bfloat16", "device": "H100 HBM3"}


def of_words(words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The LoRA and the settings that a row of `training-step.json` names."""
    r = re.search(r"\br(\d+)", words)
    lora: dict[str, Any] = {"r": int(r[1]) if r else 16, "use_dora": "DoRA" in words}
    if rate := re.search(r"dropout (\S+)", words):
        lora["lora_dropout"] = float(rate[1])
    how: dict[str, Any] = {"checkpointing": "checkpointing" in words, "optimised": "optimised" in words}
    return lora, {**how, "adapter_dtype": "bfloat16"} if "bf16 adapters" in words else how


def recorded() -> Iterator[dict[str, Any]]:
    """The rows that were measured before, beside what is foretold of them now."""
    steps = json.loads((HERE / "results" / "training-step.json").read_text())
    for found in steps["rows"]:
        if found["who"] == "graftlet":
            lora, how = of_words(found["what"])
            yield _beside(found["what"], lora, how, found["GB"] * 1e9, found["ms"] / 1e3)
    packed = json.loads((HERE / "results" / "quantised-gpu.json").read_text())["speed"]
    for words in ("all kept", "checkpointing"):
        found = packed[f"graftlet, no autocast, {words}"]
        how = {"quantisation": "nf4", "prepared": False, "checkpointing": words == "checkpointing"}
        name = "4 bits r16" + (" checkpointing" if how["checkpointing"] else "")
        yield _beside(name, {"r": 16}, how, found["peak GiB"] * 2**30, found["step ms"] / 1e3)


def _beside(name: str, lora: dict[str, Any], how: dict[str, Any], peak: float, seconds: float) -> dict[str, Any]:
    config = graftlet.LoraConfig(target_modules=LINEAR, **lora)
    found = graftlet.estimate(EIGHT_BILLION, config, **STEP, **how)
    parts = {k: v for k, v in vars(found.memory).items() if k != "phase"}
    return {
        "case": name,
        "device": found.device.name,
        "predicted": found.peak,
        "measured": round(peak),
        "predicted_seconds": found.time.likely,
        "least_seconds": found.time.least,
        "seconds": seconds,
        **parts,
    }


# every method on a stack of layers


class Block(torch.nn.Module):
    """The block of `stack.py`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.l = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.l(self.norm(x))


def stacked() -> Iterator[dict[str, Any]]:
    """What a step takes beside what is held before it, of every method on six layers of 4,096 on a GPU (`stack.py`)."""
    found = json.loads((HERE / "results" / "stack-cuda.json").read_text())
    for one in found["rows"]:
        name = {"DoRA": "LORA"}.get(one["method"], one["method"])
        if one.get("GB", {}).get("graftlet") is None or name in BY_WEIGHTS:
            continue
        config = graftlet.PeftConfig.from_dict({"peft_type": name, "target_modules": ["l"], **one["fields"]})
        peak = round(one["GB"]["graftlet"] * 1e9)
        yield {"case": one["method"], "device": found["device"], "predicted": beside(config), "measured": peak}


BY_WEIGHTS = {"ADAMSS"}
"""Methods whose sizes depend on the numbers of the base's weights."""


def beside(config: Any, layers: int = 6, width: int = 4096, tokens: int = 4096) -> int:
    """Bytes that a step of the stack takes beside what was there."""
    with torch.device("meta"):
        model: Any = torch.nn.Sequential(*(Block(width) for _ in range(layers))).to(torch.bfloat16)
        model = graftlet.get_peft_model(model, config).train()
    book = Ledger(kind="cuda", whole=True)
    with rehearsal("cuda"), Operations("cuda", book), book:
        x = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
        book.note_all([*parts_of(model), x], "weights")
        held = sum(h.size for h in book.held)
        with book.during("forward"):
            loss = model(x).float().square().mean()
        with book.during("backward"):
            backward(loss)
    return book.peak().total - held


# the guide's tables


def table(rows: list[dict[str, Any]]) -> str:
    big = max(r["measured"] for r in rows) > 1e9
    unit, size = ("GB", 1e9) if big else ("MB", 1e6)
    lines = [f"| case | foretold ({unit}) | measured ({unit}) | off by |", "|---|---:|---:|---:|"]
    for r in rows:
        off = r["predicted"] / r["measured"] - 1
        lines.append(f"| {r['case']} | {r['predicted'] / size:.2f} | {r['measured'] / size:.2f} | {off:+.1%} |")
    return "\n".join(lines)


def times(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | at least (ms) | likely (ms) | measured (ms) |", "|---|---:|---:|---:|"]
    for r in rows:
        parts = r["least_seconds"], r["predicted_seconds"], r["seconds"]
        lines.append(f"| {r['case']} | " + " | ".join(f"{1e3 * t:.0f}" for t in parts) + " |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Every generated table of the guide, by the name of its place."""
    rows = {
        "cpu": results.get("cpu"),
        "gpu": results.get("recorded"),
        "stack": results.get("stack"),
        "more": results.get("gpu"),
    }
    return {
        **{name: table(held) for name, held in rows.items() if held},
        **({"time": times(results["recorded"])} if "recorded" in results else {}),
    }


def written(text: str, results: dict[str, Any]) -> str:
    """The guide with its tables anew."""
    for name, made in tables(results).items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>\n{made}\n\n\g<2>", text, flags=re.S)
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    warnings.simplefilter("ignore")
    if not options.table and not options.only and not options.gpu:
        results |= {"recorded": list(recorded()), "stack": list(stacked())}
        keep(results)
    for case in () if options.table else CASES:
        if options.only in case:
            device = "cuda" if options.gpu else "cpu"
            made = {"case": case, **row(case, device), **foretold(case, device)}
            print(f"{case:32} {made['predicted'] / made['measured'] - 1:+.2%}", flush=True)
            name = "gpu" if options.gpu else "cpu"
            results[name] = [r for r in results.get(name, []) if r["case"] != case] + [made]
            keep(results)
    if GUIDE.exists():
        GUIDE.write_text(written(GUIDE.read_text(), results))


def keep(results: dict[str, Any]) -> None:
    """Write what there is so far."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "graftlet": graftlet.__version__}
    facts = {"date": str(datetime.date.today()), "versions": versions}
    RESULTS.write_text(json.dumps({**results, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
