# SPDX-License-Identifier: Apache-2.0
"""A training step of a Llama of 8B shape with 16 layers on one GPU: the frozen base, Graftlet and the reference in one run.

    python benchmarks/gpu/training_step.py [--only WORD,...] [--out DIR] [--small] [--profile WORD]

bf16 weights, batch 2 x 2,048 tokens, adapters on all linear layers, forward, backward and AdamW; medians of the device's own
clock, and the peak of memory that torch allocated. First, on small layers, the fast way is compared with the plain one.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import graftlet
import graftlet.model.optimised
from graftlet.core.kernel import SWITCH, kernels

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], Any]


def base(small: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16, "vocab_size": 128256}
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_theta=500000.0, dtype=torch.bfloat16))
    model.config.use_cache = False
    return model.to(torch.bfloat16).requires_grad_(False).train()


def release() -> None:
    gc.collect()
    gc.freeze()  # the collector would look through what earlier cases left, as in no process that trains one adapter
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(step: Step) -> float:
    if DEVICE == "cpu":
        step()
        return 0.0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measured(step: Step, warmups: int = 3, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds and peak memory in GB of a step."""
    for _ in range(warmups):
        step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
    return {"ms": round(statistics.median(times), 2), "least": round(min(times), 2), "GB": round(peak, 2)}


# the cases


def frozen(model: LlamaForCausalLM, ids: torch.Tensor) -> Step:
    """Forward, and the gradient of the input's embeddings: what no adapter's step can be without."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, labels=ids).loss.backward()

    return step


def training(model: Any, ids: torch.Tensor) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=DEVICE == "cuda")

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


FUSED = "optimised"
CASES: dict[str, dict[str, Any]] = {
    "r16": {},
    "r16 bf16 adapters": {"autocast_adapter_dtype": False},
    "r16 dropout 0.05": {"lora_dropout": 0.05},
    "r64": {"r": 64},
    "DoRA r16": {"use_dora": True},
    "r16 checkpointing": {"checkpointing": True},
    f"r16 {FUSED}": {"fused": True},
    f"r64 {FUSED}": {"r": 64, "fused": True},
    f"r16 dropout 0.05 {FUSED}": {"lora_dropout": 0.05, "fused": True},
    f"r16 checkpointing {FUSED}": {"checkpointing": True, "fused": True},
    f"DoRA r16 {FUSED}": {"use_dora": True, "fused": True},
}


def adapted(library: Any, model: LlamaForCausalLM, case: dict[str, Any]) -> Any:
    options = dict(case)
    checkpointing, fused = options.pop("checkpointing", False), options.pop("fused", False)
    wrap = {"autocast_adapter_dtype": options.pop("autocast_adapter_dtype", True)}
    config = library.LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": LINEAR, **options})
    made = library.get_peft_model(model, config, **wrap)
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.enable_input_require_grads()
    if fused:
        print(graftlet.model.optimised.optimised(graftlet.optimize_model(made)))
    return made.train()


def libraries() -> dict[str, Any]:
    import peft

    return {"graftlet": graftlet, "reference": peft}


def run_case(name: str, key: str, library: Any, model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, Any]:
    case = CASES[name]
    torch.manual_seed(1)
    made = adapted(library, model, case)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.01)
    try:
        return {"what": name, "who": key, **measured(training(made, ids))}
    except torch.OutOfMemoryError as error:
        return {"what": name, "who": key, "error": str(error)[:80]}
    finally:
        graftlet.restore_model(model)
        made.unload()
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads() if case.get("checkpointing") else None
        model.requires_grad_(False)
        release()


# correctness


def gradients(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def farthest(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """How far what was found is from what was wanted, by norms, at the worst."""
    return max(float((found - wanted).detach().norm() / wanted.detach().norm()) for found, wanted in pairs)


def check_dropout() -> list[str]:
    """Products with dropout beside the same products with the very entries dropped that the bits say."""
    if DEVICE != "cuda":
        return ["skipped dropout: no CUDA"]
    from graftlet.kernels import dropped_triton as kernels

    said = []
    for n, k, r in ((64, 128, 16), (37, 96, 5), (200, 160, 64), (4096, 4096, 16)):
        x, A, dh = (torch.randn(*s, device=DEVICE).bfloat16() for s in ((n, k), (r, k), (n, r)))
        several = kernels.bits(x, 0.3, 5)
        words = several[1]
        mask = torch.cat([words >> j & 1 for j in range(8)], 1).to(x.dtype)
        part, spread = (dh, A, words), (dh.double() @ A.double()) * mask
        pairs = {
            "shrunk": (kernels.shrunk(x, words[None], [A]), (x * mask).double() @ A.double().T),
            "several": (kernels.shrunk(x, several, [A] * 5)[:, r : 2 * r], (x * mask).double() @ A.double().T),
            "outer": (kernels.outer(dh, x, words), dh.double().T @ (x * mask).double()),
            "spread": (kernels.spread([part], None), spread),
            "added": (kernels.spread([part] * 4, x.clone()), 4 * spread + x),
        }
        worst = farthest(pairs.values())
        share = float(mask.float().mean())
        good = worst < 1e-2 and abs(share - 0.7) < 5 * (0.21 / (n * k)) ** 0.5
        said.append(f"{'passed' if good else 'FAILED'} dropout {n, k, r}: worst {worst:.1e}, kept {share:.3f}")
    state = torch.cuda.get_rng_state()
    first, second = kernels.bits(x, 0.3, 1), kernels.bits(x, 0.3, 1)
    torch.cuda.set_rng_state(state)
    good = torch.equal(first, kernels.bits(x, 0.3, 1)) and not torch.equal(first, second)
    return [*said, f"{'passed' if good else 'FAILED'} dropout is drawn by torch's generator"]


def check_gain() -> list[str]:
    """DoRA's passes and norms beside the same in double precision."""
    if DEVICE != "cuda":
        return ["skipped gain: no CUDA"]
    from graftlet.kernels import gain_triton as kernels

    said = []
    for n, m, r in ((64, 128, 16), (37, 97, 5), (130, 4096, 64), (4096, 1024, 16)):
        z, dy = (torch.randn(n, m, device=DEVICE).bfloat16() for _ in "zy")
        gain, W = torch.rand(m, device=DEVICE) + 0.5, torch.randn(m, 80, device=DEVICE).bfloat16()
        A, B = torch.randn(r, 80, device=DEVICE), torch.randn(m, r, device=DEVICE)
        dz, dgain = kernels.regained(dy, z, gain)
        asked = (W, A, B, W.float().square().sum(1), 0.7)
        other = (
            W[:32].clone(),
            A[:3].contiguous(),
            B[:32, :3].contiguous(),
            torch.ones(32, device=DEVICE),
            1.0,
        )
        wanted = (W + 0.7 * B @ A).norm(dim=1)
        pairs = {
            "gained": (kernels.gained(z, gain), z.double() * gain),
            "dz": (dz, dy.double() * gain),
            "dgain": (dgain, (dy.double() * z).sum(0)),
            "norms": (kernels.norms([asked])[0], wanted),
            "several norms": (kernels.norms([other, asked, other])[1], wanted),
        }
        worst = farthest(pairs.values())
        said.append(f"{'passed' if worst < 1e-2 else 'FAILED'} gain {n, m, r}: worst {worst:.1e}")
    return said


def check_gated() -> list[str]:
    """Gated products' way back beside torch's own; a second one through the same graph is refused, not wrong."""
    if DEVICE != "cuda":
        return ["skipped gated: no CUDA"]
    from graftlet.kernels.dropped_triton import bits
    from graftlet.kernels.gated import outer, pulled
    from graftlet.kernels.recipe import Thin

    said = []
    acts = {"silu": torch.nn.functional.silu, "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
    for name, (n, m, ranks) in itertools.product(
        acts, ((37, 530, (0, 0, 0)), (37, 530, (5, 7, 16)), (300, 1024, (16, 0, 32)))
    ):
        a, b, d = (torch.randn(n, m, device=DEVICE).bfloat16() for _ in "abd")
        dh, *hs = (torch.randn(n, 40, device=DEVICE).bfloat16()[:, :r] if r else None for r in ranks)
        parts = [t.double().requires_grad_() for t in (a, b)]
        y = acts[name](parts[0]) * parts[1]
        grads = torch.autograd.grad(y, parts, d.double())
        found = pulled(name, d, dh, [None if h is None else Thin(h, 0.7) for h in hs], (a, b))
        pairs = [*zip(found.grads, grads, strict=True)]
        pairs.append((found.made, y) if dh is None else (found.dA, dh.double().T @ y))
        hows = zip(hs, grads, found.dBs, strict=True)
        pairs += [(dB, 0.7 * dy.T @ h.double()) for h, dy, dB in hows if h is not None]
        a, b = (torch.randn(n, m, device=DEVICE).bfloat16() for _ in "ab")  # the others were written over
        pairs += [] if dh is None else [(outer(dh, None, a, b), dh.double().T @ (a * b).double())]
        if dh is not None and m % 8 == 0:
            words = bits(a, 0.3, 1)[0]
            dropped = (a * b).double() * torch.cat([words >> j & 1 for j in range(8)], 1)
            pairs.append((outer(dh, words, a, b), dh.double().T @ dropped))
        worst = farthest(pairs)
        said.append(f"{'passed' if worst < 1e-2 else 'FAILED'} gated {name} {n, m, *ranks}: worst {worst:.1e}")
    model = base(small=True)
    made = graftlet.optimize_model(adapted(graftlet, model, {}))
    ids = torch.randint(0, 512, (3, 37), device=DEVICE)
    loss = made(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return [*said, f"passed a second backward is refused: {str(error)[:60]}"]
    return [*said, "FAILED a second backward went through"]


def check_autocast() -> list[str]:
    """The fused way beside the model's own under autocast, with a base of either dtype."""
    if DEVICE != "cuda":
        return ["skipped autocast: no CUDA"]
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        made = adapted(graftlet, base(small=True).to(dtype), {})
        for n, p in made.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.05)
        ids = torch.arange(111, device=DEVICE).view(3, 37)
        with torch.autocast(DEVICE, torch.bfloat16):
            own = gradients(made, ids)
            fused = gradients(graftlet.optimize_model(made), ids)
        worst = farthest((fused[1][n], g) for n, g in own[1].items())
        good = worst < 6e-2 and abs(fused[0] - own[0]) < 2e-2
        said.append(f"{'passed' if good else 'FAILED'} autocast, {dtype}: worst gradient {worst:.1e}")
    return said


def check() -> list[str]:
    """The fast way beside the plain one on a small model: the same loss, the same gradients."""
    said = []
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 6e-2)):
        for options in ({}, {"r": 5}, {"use_rslora": True}, {"use_dora": True}):
            model = base(small=True).to(dtype)
            ids = torch.randint(0, 512, (3, 37), device=DEVICE)
            made = adapted(graftlet, model, {"r": 16, **options})
            for n, p in made.named_parameters():
                if "lora_B" in n:
                    torch.nn.init.normal_(p, std=0.05)
            fast = gradients(made, ids)
            os.environ[SWITCH] = "0"
            kernels.cache_clear()
            plain = gradients(made, ids)
            os.environ[SWITCH] = "1"
            kernels.cache_clear()
            worst = max(float((fast[1][n] - g).norm() / g.norm()) for n, g in plain[1].items())
            good = fast[1].keys() == plain[1].keys() and worst < bound and abs(fast[0] - plain[0]) < bound
            said.append(f"{'passed' if good else 'FAILED'} {dtype} {options}: worst gradient {worst:.1e}")
            fused = gradients(graftlet.optimize_model(made), ids)
            worst = max(float((fused[1][n] - g).norm() / g.norm()) for n, g in plain[1].items())
            good = fused[1].keys() == plain[1].keys() and worst < bound and abs(fused[0] - plain[0]) < bound
            said.append(f"{'passed' if good else 'FAILED'} {dtype} {options} fused: worst gradient {worst:.1e}")
            graftlet.restore_model(made)
            again = gradients(made, ids)
            same = all(torch.equal(again[1][n], g) for n, g in fast[1].items())
            said.append(f"{'passed' if same else 'FAILED'} restored: {graftlet.optimised(made)}")
    return said


def profile(step: Step, rows: int = 45) -> Iterator[str]:
    """Where a step's time goes: the kernels by their sum, and the longest times in which none ran."""
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = sorted((e for e in found.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    sums: dict[str, list[float]] = {}
    for event in events:
        sums.setdefault(event.name, []).append(event.time_range.elapsed_us())
    yield f"{len(events)} kernels, busy {sum(map(sum, sums.values())) / 1000:.1f} ms"
    for name, times in sorted(sums.items(), key=lambda pair: -sum(pair[1]))[:rows]:
        yield f"{sum(times) / 1000:8.2f} ms {len(times):5} x {sum(times) / len(times):8.1f} us  {name[:90]}"
    gaps, end = [], events[0].time_range.start
    for i, event in enumerate(events):
        gaps.append((event.time_range.start - end, i))
        end = max(end, event.time_range.end)
    yield f"idle {sum(max(g, 0) for g, _ in gaps) / 1000:.1f} ms of {(end - events[0].time_range.start) / 1000:.1f}"
    for gap, i in sorted(gaps, reverse=True)[:12]:
        yield f"{gap:8.1f} us before kernel {i}: {events[i].name[:60]} after {events[i - 1].name[:60]}"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'what':28} {'who':10} {'ms':>8} {'least':>8} {'GB':>7}"
    for row in rows:
        yield f"{row['what']:28} {row['who']:10} " + (
            row["error"] if "error" in row else f"{row['ms']:8.1f} {row['least']:8.1f} {row['GB']:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--who", default="graftlet,reference")
    parser.add_argument("--out")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--profile", default="")
    options = parser.parse_args()
    print(*check_dropout(), *check_gain(), *check_gated(), *check_autocast(), *check(), sep="\n", flush=True)
    model = base(options.small)
    ids = torch.randint(0, model.config.vocab_size, (2, 64 if options.small else 2048), device=DEVICE)
    only = [w for w in options.only.split(",") if w]
    rows = [{"what": "frozen base, forward and dX", "who": "base", **measured(frozen(model, ids))}]
    release()
    for name in CASES:
        for key, library in libraries().items():
            ours_alone = FUSED in name and key != "graftlet"
            if (not only or name in only) and key in options.who.split(",") and not ours_alone:
                rows.append(run_case(name, key, library, model, ids))
                print(rows[-1], flush=True)
    if options.profile:
        print(*profile(training(adapted(graftlet, model, CASES[options.profile]), ids)), sep="\n")
    print(*table(rows), sep="\n")
    if options.out:
        facts = {
            "date": str(datetime.date.today()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        results = {**facts, "device": device, "graftlet": graftlet.__version__, "rows": rows}
        Path(options.out, "training-step.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
