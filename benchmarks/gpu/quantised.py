# SPDX-License-Identifier: Apache-2.0
"""QLoRA on one GPU: a 4-bit base alone, Graftlet and the reference on it. Correctness first, then step time and memory.

    python benchmarks/gpu/quantised.py [--out benchmarks/results] [--steps 8]
    python benchmarks/gpu/quantised.py --small     # a smoke test, on the CPU as well

The model has the shape of an 8-billion Llama with 16 layers and random weights, quantised as NF4 with double quantisation,
computing in bfloat16. Rank 16 on all linear layers, batch 2 x 2048. Every case starts from an empty device; one that fails
is told and left out.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import platform
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHOLE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = ("graftlet", "reference")
OPTIMISED = ", optimised"


def base(sizes: dict[str, int], device: torch.device, layers: int | None = None) -> Any:
    """A random Llama whose linear layers, but for the head, are made in bfloat16 and quantised one by one."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]}
    config = LlamaConfig(**sizes, max_position_embeddings=4096, use_cache=False, attn_implementation="sdpa")
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in LINEAR:
                packed = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    compress_statistics=True,
                    device="meta",
                )
                weight = torch.randn(child.weight.shape, dtype=torch.bfloat16, device=device) * 0.02
                packed.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
                ).to(device)
                setattr(parent, name, packed)
    _fill(model, device)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def _fill(model: Any, device: torch.device) -> None:
    """The embeddings, norms and head that are on meta still, and the tables of rotations."""
    for parent in model.modules():
        for name, parameter in list(parent._parameters.items()):
            if parameter is not None and parameter.is_meta:
                made = torch.ones if parameter.dim() == 1 else torch.randn
                value = made(parameter.shape, dtype=parameter.dtype, device=device) * (
                    1 if parameter.dim() == 1 else 0.02
                )
                parent._parameters[name] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)


def adapted(kind: str, model: Any, r: int) -> Any:
    """A LoRA on all linear layers by one of the two libraries, with a B that is not zero."""
    if kind == "graftlet":
        import graftlet as library
    else:
        import peft as library
    config: Any = library.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR, task_type="CAUSAL_LM")
    made: Any = library.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            if "lora_" in name:
                scale = 0.01 if "lora_B" in name else 0.05
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made


def grads_of(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of an adapter by a name that both libraries have."""
    return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))


# correctness


def check(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Two layers: outputs and gradients of both libraries against a dense model in float32, merging, and the bits after."""
    model = base(args.sizes, device, layers=2)
    ids = torch.randint(0, args.sizes["vocab_size"], (2, min(args.tokens, 256)), device=device)
    found: dict[str, Any] = {}
    dense = _dense(model, device)
    truth = adapted("graftlet", dense, args.r)
    right, right_grads = _pass(truth, ids, autocast=False)
    for kind in KINDS:
        with case(found, kind):
            one = adapted(kind, copy.deepcopy(model), args.r)
            y, grads = _pass(one, ids, autocast=True)
            found[kind] = {
                "logits off": relative(y, right),
                "worst gradient off": max(relative(grads[n], right_grads[n]) for n in right_grads),
            }
    with case(found, "merging"):
        found["merging"] = _merging(copy.deepcopy(model), ids, args.r)
    return found


def _dense(model: Any, device: torch.device) -> Any:
    from graftlet.core.dense import dequantised

    made = copy.deepcopy(model)
    with dequantised(made):
        pass
    return made.to(device, torch.float32)


def _pass(model: Any, ids: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach().float(), grads_of(model)


@torch.no_grad()
def _merging(model: Any, ids: torch.Tensor, r: int) -> dict[str, Any]:
    import graftlet

    one = adapted("graftlet", model, r).eval()
    before = {n: p.detach().clone() for n, p in one.named_parameters() if type(p).__name__ == "Params4bit"}
    y = one(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.merge_adapter()
    worst = max(graftlet.merge_errors(one).values(), key=lambda e: e.weight)
    rounded = relative(one(input_ids=ids).logits, y)
    one.unmerge_adapter()
    same = all(torch.equal(p, before[n]) for n, p in one.named_parameters() if n in before)
    return {
        "worst layer, share of its weight": worst.weight,
        "of the adapter's change": worst.change,
        "logits off, merged in 4 bits": rounded,
        "bits restored": same,
        "output restored": bool(torch.equal(one(input_ids=ids).logits, y)),
        "logits off, merged dequantised": relative(one.merge_and_unload(dequantize=True)(input_ids=ids).logits, y),
    }


# speed


def timed(args: argparse.Namespace, device: torch.device, kind: str, autocast: bool, saving: bool) -> dict[str, float]:
    """A training step: forward, backward and the optimiser. The base alone runs forward, and backward to its input."""
    model = base(args.sizes, device)
    if kind != "base":
        model = adapted(kind.removesuffix(OPTIMISED), model, args.r)
    if kind.endswith(OPTIMISED):
        import graftlet

        graftlet.optimize_model(model)
    model.train()
    if saving:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, 1e-4, fused=device.type == "cuda") if learning else None
    ids = torch.randint(0, args.sizes["vocab_size"], (args.batch, args.tokens), device=device)
    words = model.get_input_embeddings()

    def step() -> None:
        given = {"input_ids": ids} if optimiser else {"inputs_embeds": words(ids).detach().requires_grad_()}
        with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            loss = model(**given, labels=ids).loss
        loss.backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return measured(step, args.steps, device, args.batch * args.tokens)


def measured(step: Callable[[], None], steps: int, device: torch.device, tokens: int) -> dict[str, float]:
    for _ in range(3):
        step()
    synchronise(device)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds(step, device) for _ in range(steps)]
    middle = statistics.median(times)
    found = {"step ms": middle * 1e3, "least ms": min(times) * 1e3, "tokens/s": tokens / middle}
    if device.type == "cuda":
        found |= {"peak GiB": torch.cuda.max_memory_allocated(device) / 2**30, "model GiB": held / 2**30}
    return found


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """How long a step takes: by the device's own clock, where it has one."""
    if device.type != "cuda":
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def case(found: dict[str, Any], name: str) -> Iterator[None]:
    """One case: an error is recorded in place of a result, and the device is empty afterwards."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def speeds(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for saving in (False, True):
        for autocast in (False, True):
            for kind in ("base", *KINDS, f"graftlet{OPTIMISED}"):
                how = (
                    f"{kind}, {'autocast' if autocast else 'no autocast'}, {'checkpointing' if saving else 'all kept'}"
                )
                if args.only not in how:
                    continue
                with case(found, how):
                    found[how] = timed(args, device, kind, autocast, saving)
                print(f"{how:<45}", line(found[how]), flush=True)
    return found


def line(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    return "   ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {}
    for package in ("torch", "transformers", "bitsandbytes", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a tiny model, few steps: whether all of it runs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--only", default="", help="cases with this word in their name")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.sizes = SMALL if args.small else WHOLE
    if args.small:
        args.steps, args.tokens, args.r = min(args.steps, 2), min(args.tokens, 32), min(args.r, 8)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": where,
        "versions": versions(),
        "model": args.sizes,
        "batch": [args.batch, args.tokens],
        "r": args.r,
        "correctness": {},
    }
    print(where, result["versions"])
    with case(result, "correctness"):
        result["correctness"] = check(args, device)
    for name, facts in result["correctness"].items():
        print(f"{name:<12}", line(facts) if isinstance(facts, dict) else facts)
    result["speed"] = speeds(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"quantised-{'small' if args.small else 'gpu'}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
