# SPDX-License-Identifier: Apache-2.0
"""Adapters trained on several GPUs: first that they are those of one GPU, then what a step takes. Prints passed or FAILED.

    torchrun --nproc-per-node 2 benchmarks/gpu/several.py [--out DIR] [--small]

Correctness: a small Llama in single precision, LoRA and DoRA, three steps; each GPU also trains on all rows by itself, and the
adapters are compared. Time: a Llama of 8B shape with 8 layers in bf16, LoRA r=16 on all linear layers, 2 x 2,048 tokens a GPU,
forward, backward and AdamW; medians of the device's own clock, and the peak of memory that torch allocated on the first GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training_step import LINEAR, measured, release

import graftlet
from graftlet.integrations import shard
from graftlet.weights.whole import put, whole

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "vocab_size": 128256, **HEADS}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512, **HEADS}
PACKED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def llama(sizes: dict[str, int], dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, dtype=dtype))
    model.config.use_cache = False
    return model.to(dtype).requires_grad_(False).train()


def packed(folder: str, dtype: torch.dtype) -> Any:
    """A saved base in 4 bits, its packed numbers kept as numbers of its own dtype, as FSDP2 asks."""
    kept = BitsAndBytesConfig(**PACKED, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)
    place = {"": torch.cuda.current_device()}
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=kept, device_map=place, dtype=dtype)
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return graftlet.get_peft_model(model, graftlet.LoraConfig(r=16, target_modules=LINEAR, **options))


def ddp(model: Any) -> Any:
    made = nn.parallel.DistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
    made.config = model.config
    return made


# what is trained is what one GPU trains


def trained(model: Any, rows: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter after three steps on a part of each batch."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            start = whole(parameter)
            put(parameter, start + 0.02 * torch.randn(start.shape, device="cpu").to(start.device))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number in range(3):
        torch.manual_seed(100 + number)
        ids = rows(torch.randint(0, 512, (8, 64))).cuda()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return graftlet.get_peft_model_state_dict(getattr(model, "module", model))


def own(batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def cases(folder: str) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    """A name, what makes a model, and what binds the GPUs together."""
    single = torch.float32

    for kind, options in (("LoRA", {}), ("DoRA", {"use_dora": True})):
        for name, engine in (("DDP", ddp), ("FSDP2", shard)):
            yield f"{kind}, {name}", lambda o=options: adapted(llama(SMALL, single), **o), engine
        yield f"{kind} on 4 bits, FSDP2", lambda o=options: adapted(packed(folder, single), **o), shard


def compare(folder: str) -> list[dict[str, Any]]:
    found = []
    for name, make, engine in cases(folder):
        one = trained(make(), lambda batch: batch)
        several = trained(engine(make()), own)
        start = {k: t.float().cpu() for k, t in graftlet.get_peft_model_state_dict(make()).items()}
        off = max(
            float((several[k].cpu() - one[k].cpu()).abs().max() / (one[k].cpu() - start[k]).abs().max()) for k in one
        )
        good = several.keys() == one.keys() and off < 2e-3
        found.append({"what": name, "off": off, "passed": good})
        told(f"{name:24} {'passed' if good else 'FAILED'}: off from one GPU's adapter by {off:.1e} of what it learned")
        release()
    return found


# what a step takes


def step_of(model: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (2, 2048), device="cuda")

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def times(sizes: dict[str, int], folder: str) -> list[dict[str, Any]]:
    half, rows = torch.bfloat16, []

    kinds: dict[str, Callable[[], Any]] = {
        "each GPU for itself": lambda: adapted(llama(sizes, half)),
        "DDP": lambda: ddp(adapted(llama(sizes, half))),
        "FSDP2": lambda: shard(adapted(llama(sizes, half))),
        "on 4 bits, each GPU for itself": lambda: adapted(packed(folder, half)),
        "on 4 bits, FSDP2": lambda: shard(adapted(packed(folder, half))),
    }
    for name, make in kinds.items():
        release()
        model = make()
        rows.append({"what": name, **measured(step_of(model))})
        told(f"{name:34} {rows[-1]['ms']:8.1f} ms {rows[-1]['GB']:6.1f} GB")
        del model
    return rows


def told(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = SMALL if options.small else LARGE
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        places: list[Any] = [folder]
        dist.broadcast_object_list(places)
        small, large = (str(Path(places[0], name)) for name in ("small", "large"))
        if dist.get_rank() == 0:
            llama(SMALL, torch.float32).save_pretrained(small)
            llama(sizes, torch.bfloat16).save_pretrained(large)
        dist.barrier()
        compared, taken = compare(small), times(sizes, large)
        dist.barrier()
    if options.out and dist.get_rank() == 0:
        facts = {
            "date": str(datetime.date.today()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "graftlet": graftlet.__version__,
            "device": f"{dist.get_world_size()} x {torch.cuda.get_device_name()}",
        }
        Path(options.out, "several-gpu.json").write_text(
            json.dumps({**facts, "compared": compared, "rows": taken}, indent=1) + "\n"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
