# SPDX-License-Identifier: Apache-2.0
"""The effects of heuristics, measured: one function each, called as the heuristic is. On the CPU, in some minutes.

    python benchmarks/heuristics.py [NAME ...] [--out benchmarks/results]

Memory is counted, tensor by tensor, and is the same at every run; times are the least of some runs. The words in the
docs are made from the figures by `python -m graftlet.knowledge`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import heuristics_models
import torch
import transformers
from toys import (
    ATTENTION,
    SHIFT,
    chain,
    ids,
    layer_stack,
    learn,
    llama,
    logits,
    lora,
    milliseconds,
    peak,
    step,
    taught,
    without_kernels,
)

import graftlet

Figures = dict[str, Any]
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

# training


def learning_rate_of_lora() -> Figures:
    """A model that knows a task is tuned to one like it, in 60 steps, at nine rates."""
    base = taught()
    full, low = {}, {}
    for rate in FULL_RATES:
        full[rate] = learn(copy.deepcopy(base), rate, 60, SHIFT)
        low[rate] = learn(lora(base), rate, 60, SHIFT)
    best, of_lora = min(full, key=lambda r: full[r]), min(low, key=lambda r: low[r])
    return {"full_best": best, "lora_best": of_lora, "ratio": of_lora / best, "full": full, "lora": low}


def rslora_for_high_ranks() -> Figures:
    """What the first step of Adam changes in the weights, at rank 4 and at rank 128, alpha 8."""

    def size(r: int, **options: Any) -> float:
        model = lora(llama(), r=r, lora_alpha=8, **options)
        model(input_ids=chain(0, 1), labels=chain(0, 1)).loss.backward()
        pairs = [m for m in model.modules() if "lora_A" in dict(m.named_children())]
        changes = [
            m.scaling["default"] * m.lora_B["default"].weight.grad.sign() @ m.lora_A["default"].weight for m in pairs
        ]
        return float(torch.stack([change.norm() for change in changes]).norm())

    return {"plain": size(128) / size(4), "rs": size(128, use_rslora=True) / size(4, use_rslora=True)}


def target_all_linear() -> Figures:
    """About as many numbers on two projections as on all layers."""
    base, found = taught(), {}
    for name, targets, r in (("narrow", ATTENTION, 23), ("wide", "all-linear", 4)):
        tries = [learn(lora(base, targets, r=r, lora_alpha=2 * r), rate, 120, SHIFT) for rate in (1e-3, 3e-3, 1e-2)]
        found[name] = min(tries)
        found[f"{name}_numbers"] = lora(base, targets, r=r).get_nb_trainable_parameters()[0]
    return {**found, "steps": 120}


def padding_as_end() -> Figures:
    """End tokens that a batch teaches: by Graftlet's collator, and where the padding's number is masked."""
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    from graftlet.train.batches import Collator

    end, rows = 1, [[5, 6, 7, 1], [8, 9, 1], [4, 3, 2, 6, 1]]
    ours = Collator(end)([{"input_ids": r, "labels": r} for r in rows])
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    )
    tokenizer.pad_token = tokenizer.eos_token = "</s>"
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": r} for r in rows])
    return {"ends": len(rows), "kept": int((ours["labels"] == end).sum()), "lost": int((theirs["labels"] == end).sum())}


def packing_without_isolation() -> Figures:
    """The logits of the second of two packed examples, beside those of that example alone."""
    model = llama().eval()
    first, second = ids(1, 12, seed=3), ids(1, 12, seed=4)
    row, alone = torch.cat([first, second], 1), logits(model, second)
    positions = torch.arange(12).repeat(2)[None]
    mixed, kept = logits(model, row)[:, 12:], logits(model, row, position_ids=positions)[:, 12:]
    return {"mixed": float((mixed - alone).abs().max()), "apart": float((kept - alone).abs().max())}


def head_trained() -> Figures:
    """Four classes told by a token, at the best of three rates."""
    from transformers import BertConfig, BertForSequenceClassification

    def loss(rate: float, **options: Any) -> float:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        base = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=4, **sizes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = graftlet.get_peft_model(base, graftlet.LoraConfig(r=2, target_modules=["query"], **options))
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        told = torch.tensor(0.0)
        for at in range(60):
            tokens = ids(32, 8, seed=at)
            told = model(input_ids=tokens, labels=tokens[:, 0] % 4).loss
            told.backward()
            optimiser.step()
            optimiser.zero_grad()
        return float(told.detach())

    rates = (1e-3, 1e-2, 3e-2)
    trained = min(loss(r, task_type="SEQ_CLS") for r in rates)
    return {"frozen": min(loss(r) for r in rates), "trained": trained, "chance": 1.3863, "steps": 60}


# memory and time


def gradient_checkpointing() -> Figures:
    """A LoRA step of 4 rows of 256 tokens; eight blocks of width 256."""
    tokens = ids(4, 256)
    plain, saving = lora(llama(256, 8)), lora(llama(256, 8))
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory = [peak(lambda m=m: step(m, tokens)) for m in (plain, saving)]
    times = milliseconds(lambda: step(plain, tokens), lambda: step(saving, tokens))
    return {"less": 1 - memory[1] / memory[0], "longer": times[1] / times[0] - 1, "bytes": memory, "ms": times}


def checkpointing_and_frozen_inputs() -> Figures:
    """Adapter tensors with a gradient after one step."""
    from torch.utils.checkpoint import checkpoint

    def count(model: Any) -> int:
        return sum(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)

    tokens, found = ids(2, 8), {}
    for name, reentrant in (("graftlet", True), ("plain", False)):
        base = graftlet.prepare_model_for_kbit_training(llama(), True, {"use_reentrant": reentrant})
        model = lora(base).train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        found[name] = count(model)
    stack: Any = graftlet.get_peft_model(layer_stack(4, 16), graftlet.LoraConfig(r=8, target_modules="all-linear"))
    stack.train()
    out: Any = checkpoint(stack, torch.randn(2, 16), use_reentrant=True)
    if out.requires_grad:
        out.sum().backward()
    of = [sum("lora_" in n for n, _ in m.named_parameters()) for m in (model, stack)]
    return {"tensors": of[0], "bare": count(stack), "bare_tensors": of[1], **found}


def accumulate_small_batches() -> Figures:
    """A step of 8 rows at once, and as 4 times 2."""
    model, tokens = lora(llama(128, 4)), ids(8, 64)

    def pieces() -> None:
        for part in tokens.split(2):
            step(model, part)

    memory = peak(lambda: step(model, tokens)), peak(pieces)
    times = milliseconds(lambda: step(model, tokens), pieces)
    return {"less": 1 - memory[1] / memory[0], "longer": times[1] / times[0] - 1}


def logits_of_a_large_vocabulary() -> Figures:
    """A step with all logits, and with those of the last tenth of each row."""
    model, tokens = lora(llama(64, 2, 32_000)), ids(2, 100, 32_000)
    whole = peak(lambda: step(model, tokens))

    def ends() -> None:
        model.train()
        model(input_ids=tokens, labels=tokens[:, -10:], logits_to_keep=10).loss.backward()
        model.zero_grad(set_to_none=True)

    return {"share": 1 - peak(ends) / whole, "bytes": whole}


def kernels_off() -> Figures:
    """A LoRA step with the one-step product and without: time in float32, memory in bfloat16."""
    model, half, tokens = lora(llama(128, 4)), lora(llama(128, 4).to(torch.bfloat16)), ids(4, 64)

    def slow(which: Any) -> None:
        with without_kernels():
            step(which, tokens)

    quick, plain = milliseconds(lambda: step(model, tokens), lambda: slow(model))
    return {"slower": plain / quick, "more": peak(lambda: slow(half)) / peak(lambda: step(half, tokens)) - 1}


def dropout_and_kernels() -> Figures:
    """A LoRA step with dropout and without, on a CPU."""
    tokens = ids(4, 64)
    plain, dropping = lora(llama(128, 4)), lora(llama(128, 4), lora_dropout=0.05)
    return {"more": peak(lambda: step(dropping, tokens)) / peak(lambda: step(plain, tokens)) - 1}


def adapters_in_half_precision() -> Figures:
    """Training at a low rate, adapters kept in single and in half precision; and the changes of A that half does not show."""
    base = taught()
    found = {"single": learn(lora(base), 1e-4, 150, SHIFT)}
    found["half"] = learn(lora(base), 1e-4, 150, SHIFT, torch.bfloat16)
    A = torch.cat([p.detach().flatten() for n, p in lora(base).named_parameters() if "lora_A" in n])
    half = A.to(torch.bfloat16)
    return {**found, "lost": float(((half - 1e-4) == half).float().mean()), "steps": 150}


def bfloat16_on_cpu() -> Figures:
    """A product of 512 x 512 matrices in both."""
    from graftlet.train.base import computes_in_bfloat16

    a = torch.randn(512, 512)
    b = a.to(torch.bfloat16)
    there = "this CPU has them" if computes_in_bfloat16(torch.device("cpu")) else "this CPU has none"
    half, single = milliseconds(lambda: b @ b, lambda: a @ a, repeats=31)
    return {"slower": half / single, "instructions": there}


def frozen_a_keeps_less() -> Figures:
    """A LoRA step with A trained and with A frozen."""
    tokens = ids(4, 64)
    plain, frozen = lora(llama(128, 4)), lora(llama(128, 4))
    for name, parameter in frozen.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return {"less": 1 - peak(lambda: step(frozen, tokens)) / peak(lambda: step(plain, tokens))}


MEASURED = {
    name.replace("_", "-"): value
    for name, value in [*globals().items(), *vars(heuristics_models).items()]
    if getattr(value, "__annotations__", {}).get("return") == "Figures"
}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    file = given.out / "heuristics.json"
    found = json.loads(file.read_text()) if file.is_file() else {"effects": {}}
    warnings.simplefilter("ignore")
    for name in given.names or MEASURED:
        figures = MEASURED[name.replace("_", "-")]()
        found["effects"][name.replace("_", "-")] = figures
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {k: v for k, v in figures.items() if not isinstance(v, dict)}, flush=True)
    found |= {
        "date": str(datetime.date.today()),
        "device": f"{_processor()}, on {torch.get_num_threads()} of {os.cpu_count()} cores",
        "graftlet": graftlet.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
