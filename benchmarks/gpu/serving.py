# SPDX-License-Identifier: Apache-2.0
"""Many adapters on one GPU: mixed batches, adding, injecting, saving, loading, swapping, combining; both libraries in one run.

    python benchmarks/gpu/serving.py [--who graftlet,reference] [--only WORD,...] [--out DIR] [--small]

The model is a Llama of 8B shape with 16 layers in bf16; adapters are on all linear layers, r=16 for mixed batches (32 of them),
r=64 for files. Medians; seconds by the host's clock with the device waited for.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training_step import DEVICE, LINEAR, base, libraries, release

import graftlet

COUNT = 32
Row = dict[str, Any]


def waited() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any], rounds: int = 5, warmups: int = 1) -> float:
    times = []
    for i in range(rounds + warmups):
        start = waited()
        work()
        times.append(waited() - start)
        if i == 0 and times[0] > 20:
            break
    return statistics.median(times[warmups:] or times)


def loop() -> float:
    """Milliseconds that the host takes for a loop of Python's own: hosts differ, and so does what else they do."""
    return round(1000 * seconds(lambda: sum(i * i for i in range(300_000)), 9), 1)


def config(library: Any, r: int) -> Any:
    return library.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR)


def filled(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def mixed(key: str, library: Any, model: Any) -> list[Row]:
    """32 rows, of 1 and of 128 tokens: the base, one adapter active, one for all rows, 32 mixed."""
    rows: list[Row] = []
    model.eval()
    inputs = {t: torch.randint(0, model.config.vocab_size, (COUNT, t), device=DEVICE) for t in (1, 128)}
    with torch.inference_mode():
        bare = {t: seconds(lambda t=t: model(input_ids=inputs[t], use_cache=False), 15) for t in inputs}
    made = filled(library.get_peft_model(model, config(library, 16), "a0"))
    start = waited()
    for i in range(1, COUNT):
        made.add_adapter(f"a{i}", config(library, 16))
    rows.append({"what": "add 31 adapters", "who": key, "s": waited() - start})
    filled(made).eval()
    made.set_adapter("a0", inference_mode=True)  # as adapters are that were loaded to serve
    names = [f"a{i}" for i in range(COUNT)]
    with torch.inference_mode():
        for t, ids in inputs.items():
            cases = {
                "one active": {},
                "1 adapter": {"adapter_names": ["a3"] * COUNT},
                "32 adapters": {"adapter_names": names},
            }
            rows.append({"what": f"{COUNT} rows of {t}, base", "who": key, "s": bare[t]})
            for what, given in cases.items():
                taken = seconds(lambda ids=ids, given=given: made(input_ids=ids, use_cache=False, **given), 15)
                rows.append({"what": f"{COUNT} rows of {t}, {what}", "who": key, "s": taken})
            if key == "graftlet":
                off = apart(made, ids, names)
                print(f"{COUNT} rows of {t}: a row is off from its adapter's own run by {off:.1e} at most", flush=True)
    made.unload()
    return rows


def apart(made: Any, ids: torch.Tensor, names: list[str]) -> float:
    """How far rows of a mixed batch are from a batch of their adapter alone, at most, as a share of the norm."""
    together = made(input_ids=ids, adapter_names=names, use_cache=False).logits
    worst = 0.0
    for i in (0, 13, 31):
        made.set_adapter(names[i])
        alone = made(input_ids=ids, use_cache=False).logits[i]
        worst = max(worst, float((together[i] - alone).float().norm() / alone.float().norm()))
    return worst


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], torch.Tensor]:
    """A call of a model as a CUDA graph, to be run again over the same memory, and the logits that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run().logits
    return graph.replay, logits


def rows_of_one_token() -> None:
    """The kernels for rows of one token against plain products: ranks and sizes of all kinds, inputs with gaps between rows."""
    from graftlet.kernels import rows_triton

    worst = 0.0
    for n, k, r, m in ((32, 4096, 16, 14336), (5, 100, 3, 70), (7, 1500, 64, 301), (3, 2049, 128, 257), (1, 33, 1, 9)):
        for dtype in (torch.bfloat16, torch.float16):
            x, y = (torch.randn(n, 2 * size, device=DEVICE, dtype=dtype)[:, :size] for size in (k, m))
            A, B = (torch.randn(4, *sizes, device=DEVICE, dtype=dtype) / 8 for sizes in ((r, k), (m, r)))
            owner = torch.randint(0, 4, (n,), device=DEVICE)
            thin = torch.einsum("nrk,nk->nr", A[owner].float(), x.float())
            right = y.float() + torch.einsum("nmr,nr->nm", B[owner].float(), thin)
            rows_triton.expand(y, y, rows_triton.shrunk(x, A, owner), B, owner)
            worst = max(worst, float((y.float() - right).norm() / right.norm()))
    print(f"rows of one token: {'passed' if worst < 4e-3 else 'FAILED'}, off by {worst:.1e} at most", flush=True)


def rows_of_a_batch() -> None:
    """The products that are summed into a layer's output, on the default stream and on one that warms up for a graph, with the
    layer as a product and as a call, against double precision.
    """
    from graftlet.core.group import Group
    from graftlet.weights.product import Product

    worst = 0.0
    for (tokens, adapters, bias), stream in itertools.product(
        [(1, 6, True), (1, 4, False), (5, 6, False), (5, 4, True)], [torch.cuda.default_stream(), torch.cuda.Stream()]
    ):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.device(DEVICE):
            x, W, b = (torch.randn(*sizes, dtype=torch.bfloat16) for sizes in ((6, tokens, 1024), (768, 1024), (768,)))
            A, B = torch.randn(adapters, 16, 1024), torch.randn(adapters, 768, 16)
            owner = torch.arange(6) % adapters
            plain = (x.double() @ W.double().t()) + (b.double() if bias else 0)
            right = plain + x.double() @ A[owner].double().mT @ B[owner].double().mT
            layer = partial(torch.nn.functional.linear, weight=W, bias=b if bias else None)
            for product in (Product(W, b if bias else None, x.dtype), None):
                y = Group(A, B).on(x, owner, layer, lambda product=product: product)
                worst = max(worst, float((y.double() - right).norm() / right.norm()))
        torch.cuda.current_stream().wait_stream(stream)
    print(f"rows of a batch: {'passed' if worst < 6e-3 else 'FAILED'}, off by {worst:.1e} at most", flush=True)


def graphs(key: str, library: Any, model: Any) -> list[Row]:
    """32 rows, of 1 and of 128 tokens, in a CUDA graph: the base, one active, 8 and 32 mixed; each beside an eager call."""
    rows: list[Row] = []
    if key != "graftlet":  # a failed capture may leave the device unusable for all that follows
        return rows
    rows_of_one_token()
    rows_of_a_batch()
    model.eval()
    made = filled(library.get_peft_model(model, config(library, 16), "a0"))
    for i in range(1, COUNT):
        made.add_adapter(f"a{i}", config(library, 16))
    filled(made).eval()
    cases = {"base": {"adapter_names": ["__base__"] * COUNT}, "one active": {}}
    cases["32 adapters"] = {"adapter_names": [f"a{i}" for i in range(COUNT)]}
    cases["8 adapters"] = {"adapter_names": [f"a{i % 8}" for i in range(COUNT)]}
    for t in (1, 128):
        ids = torch.randint(0, model.config.vocab_size, (COUNT, t), device=DEVICE)
        for what, given in cases.items():
            with torch.inference_mode():
                replay, logits = captured(lambda ids=ids, given=given: made(input_ids=ids, use_cache=False, **given))
                ids.random_(0, model.config.vocab_size)
                replay()
                expected = made(input_ids=ids, use_cache=False, **given).logits
                off = float((logits - expected).float().norm() / expected.float().norm())
                rows.append({"what": f"{COUNT} rows of {t}, {what}, CUDA graph", "who": key, "s": seconds(replay)})
            print(f"{rows[-1]['what']}: off from an eager call by {off:.1e}", flush=True)
            del replay, logits, expected
            release()
    made.unload()
    return rows


def files(key: str, library: Any, model: Any) -> list[Row]:
    """Injecting, saving, loading and swapping an adapter of r=64."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for _ in range(3):
            start = waited()
            made = library.get_peft_model(model, config(library, 64))
            rows.append({"what": "inject r64", "who": key, "s": waited() - start})
            filled(made)
            start = waited()
            made.save_pretrained(folder)
            rows.append({"what": "save r64", "who": key, "s": waited() - start})
            made.unload()
        for options in ({}, {"low_cpu_mem_usage": True}):
            for _ in range(3):
                start = waited()
                made = library.PeftModel.from_pretrained(model, folder, **options)
                rows.append(
                    {"what": f"load r64 {'low_cpu' if options else ''}".strip(), "who": key, "s": waited() - start}
                )
                made.unload()
        made = library.PeftModel.from_pretrained(model, folder)
        hotswap = __import__(
            f"{'graftlet' if key == 'graftlet' else 'peft'}.utils.hotswap", fromlist=["x"]
        ).hotswap_adapter
        rows.append({"what": "hotswap r64", "who": key, "s": seconds(lambda: hotswap(made, folder, "default"))})
        made.unload()
    return rows


def combining(key: str, library: Any, model: Any) -> list[Row]:
    """The svd combination of three adapters of r=64; merging and unmerging one."""
    made = library.get_peft_model(model, config(library, 64), "a")
    for name in "bc":
        made.add_adapter(name, config(library, 64))
    filled(made)
    rows: list[Row] = []
    made.set_adapter("a")
    rows.append(
        {"what": "merge r64", "who": key, "s": seconds(lambda: (made.merge_adapter(), made.unmerge_adapter()), 3)}
    )
    rows[-1]["what"] = "merge and unmerge r64"
    rows.append(
        {"what": "set_adapter", "who": key, "s": seconds(lambda: (made.set_adapter("b"), made.set_adapter("a"))) / 2}
    )
    if key == "graftlet":  # the reference takes minutes
        start = waited()
        made.add_weighted_adapter(["a", "b", "c"], [0.5, 0.3, 0.2], "all", combination_type="svd", svd_rank=64)
        rows.append({"what": "svd of three r64", "who": key, "s": waited() - start})
    made.unload()
    return rows


PARTS = {"mixed": mixed, "files": files, "combining": combining, "graphs": graphs}


def merged(rows: list[Row]) -> list[Row]:
    """The median of rows that stand for the same."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["what"], row["who"]), []).append(row["s"])
    return [{"what": what, "who": who, "s": statistics.median(times)} for (what, who), times in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", default="graftlet,reference")
    parser.add_argument("--only", default="")
    parser.add_argument("--out")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    model, host = base(options.small), [loop()]
    rows: list[Row] = []
    for name, part in PARTS.items():
        for key, library in libraries().items():
            if key in options.who.split(",") and (not options.only or name in options.only.split(",")):
                try:
                    rows += part(key, library, model)
                except Exception as error:
                    print(f"{name} of {key} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
                gc.collect()
                release()
    host.append(loop())
    print(f"a loop of Python's own before and after: {host} ms", flush=True)
    for row in merged(rows):
        print(f"{row['what']:48} {row['who']:10} {1000 * row['s']:10.2f} ms", flush=True)
    if options.out:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        facts = {
            "date": str(datetime.date.today()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        results = {**facts, "device": device, "graftlet": graftlet.__version__, "loop_ms": host, "rows": merged(rows)}
        Path(options.out, "serving.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
