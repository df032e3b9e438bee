# SPDX-License-Identifier: Apache-2.0
"""The effects of heuristics, measured: one function each, called as the heuristic is. On the CPU, in some minutes.

    python benchmarks/heuristics.py [NAME ...] [--out benchmarks/results]

Memory is counted, tensor by tensor, and is the same at every run; times are medians. The words in the docs are made from
the figures by `python -m graftlet.knowledge`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from toys import (
    ATTENTION,
    SHIFT,
    apart,
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
    stirred,
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
    """What the first step of gradient descent changes in the weights, at rank 4 and at rank 128, alpha 8."""

    def size(r: int, **options: Any) -> float:
        model = lora(llama(), r=r, lora_alpha=8, **options)
        model(input_ids=chain(0, 1), labels=chain(0, 1)).loss.backward()
        pairs = [m for m in model.modules() if "lora_A" in dict(m.named_children())]
        changes = [m.scaling["default"] * m.lora_B["default"].weight.grad @ m.lora_A["default"].weight for m in pairs]
        return float(torch.stack([change.norm() for change in changes]).norm())

    return {"plain": size(128) / size(4), "rs": size(128, use_rslora=True) / size(4, use_rslora=True)}


def target_all_linear() -> Figures:
    """As many numbers on two projections as on all layers."""
    base, found = taught(), {}
    for name, targets, r in (("narrow", ATTENTION, 23), ("wide", "all-linear", 4)):
        tries = [learn(lora(base, targets, r=r, lora_alpha=2 * r), rate, 120, SHIFT) for rate in (1e-3, 3e-3, 1e-2)]
        found[name] = min(tries)
        found[f"{name}_numbers"] = lora(base, targets, r=r).get_nb_trainable_parameters()[0]
    return {**found, "numbers": found["wide_numbers"], "steps": 120}


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
    times = [milliseconds(lambda m=m: step(m, tokens)) for m in (plain, saving)]
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
    model, tokens = lora(llama(256, 8)), ids(8, 128)

    def pieces() -> None:
        for part in tokens.split(2):
            step(model, part)

    memory = peak(lambda: step(model, tokens)), peak(pieces)
    times = milliseconds(lambda: step(model, tokens)), milliseconds(pieces)
    return {"less": 1 - memory[1] / memory[0], "longer": times[1] / times[0] - 1}


def logits_of_a_large_vocabulary() -> Figures:
    """A step with all logits, and with those of the last tenth of each row."""
    model, tokens = lora(llama(128, 4, 32_000)), ids(4, 200, 32_000)
    whole = peak(lambda: step(model, tokens))

    def ends() -> None:
        model.train()
        model(input_ids=tokens, labels=tokens[:, -20:], logits_to_keep=20).loss.backward()
        model.zero_grad(set_to_none=True)

    return {"share": 1 - peak(ends) / whole, "bytes": whole}


def kernels_off() -> Figures:
    """A LoRA step with the one-step product and without."""
    model, tokens = lora(llama(256, 4).to(torch.float32)), ids(4, 128)

    def work() -> None:
        step(model, tokens)

    quick, memory = milliseconds(work), peak(work)
    with without_kernels():
        return {"slower": milliseconds(work) / quick, "more": peak(work) / memory - 1}


def dropout_and_kernels() -> Figures:
    """A LoRA step with dropout and without, on a CPU."""
    tokens = ids(4, 128)
    plain, dropping = lora(llama(256, 4)), lora(llama(256, 4), lora_dropout=0.05)
    return {"more": peak(lambda: step(dropping, tokens)) / peak(lambda: step(plain, tokens)) - 1}


def adapters_in_half_precision() -> Figures:
    """Training at a low rate, in single and in half precision, and the changes of A that half precision does not show."""
    base, found = taught().to(torch.bfloat16), {}
    for name, dtype in (("single", torch.float32), ("half", torch.bfloat16)):
        model = lora(base)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        found[name] = learn(model, 1e-4, 300, SHIFT)
    A = torch.cat([p.detach().flatten() for n, p in lora(base).named_parameters() if "lora_A" in n])
    half = A.to(torch.bfloat16)
    return {**found, "lost": float(((half - 1e-4) == half).float().mean()), "steps": 300}


def bfloat16_on_cpu() -> Figures:
    """A product of 512 x 512 matrices in both."""
    from graftlet.train.base import computes_in_bfloat16

    a = torch.randn(512, 512)
    b = a.to(torch.bfloat16)
    there = "this CPU has them" if computes_in_bfloat16(torch.device("cpu")) else "this CPU has none"
    return {"slower": milliseconds(lambda: b @ b, 31) / milliseconds(lambda: a @ a, 31), "instructions": there}


def frozen_a_keeps_less() -> Figures:
    """A LoRA step with A trained and with A frozen."""
    tokens = ids(4, 256)
    plain, frozen = lora(llama(256, 4)), lora(llama(256, 4))
    for name, parameter in frozen.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return {"less": 1 - peak(lambda: step(frozen, tokens)) / peak(lambda: step(plain, tokens))}


# models


def _quantised() -> Any:
    import bitsandbytes as bnb

    dense = layer_stack(2, 256)
    packed = nn.Sequential(*(bnb.nn.Linear4bit(256, 256, quant_type="nf4") for _ in dense))
    packed.load_state_dict(dense.state_dict())
    return packed.to("cpu")


def merge_into_quantised() -> Figures:
    """Two NF4 layers of 256 with an adapter of rank 8."""

    def adapted() -> Any:
        config = graftlet.LoraConfig(r=8, target_modules="all-linear")
        return stirred(graftlet.get_peft_model(_quantised(), config), 0.01)

    model, x = adapted(), torch.randn(32, 256)
    with torch.no_grad():
        wanted = model(x)
        dense = adapted().merge_and_unload(dequantize=True)(x)
    model.merge_adapter()
    worst = max(graftlet.merge_errors(model).values(), key=lambda lost: lost.change)
    return {"of_weight": worst.weight, "of_change": worst.change, "dequantised": apart(dense, wanted)}


def clone_of_quantised_output() -> Figures:
    """Gradients below a 4-bit layer whose output is added to in place, copied before and not."""
    layer, found = _quantised()[0], {}
    for name in ("copied", "as_it_is"):
        torch.manual_seed(0)
        x, more = torch.randn(64, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True)
        y = layer(x)
        y = y.clone() if name == "copied" else y
        y += more
        y.square().sum().backward()
        found[name] = torch.cat([x.grad, more.grad])  # pyright: ignore[reportArgumentType, reportCallIssue]
    size = 64 * 256 * 4
    return {"difference": float((found["copied"] - found["as_it_is"]).abs().max()), "bytes": size, "output": size}


def embeddings_saved() -> Figures:
    """Two tokens added; saved with the embeddings and without, and loaded on a base that is resized again."""
    model = llama(vocabulary=500)
    model.resize_token_embeddings(502, mean_resizing=False)
    adapter, tokens = stirred(lora(model)), torch.tensor([[3, 500, 501, 4]])
    wanted, sizes, found = logits(adapter, tokens), {}, {}
    for name, along in (("along", True), ("without", False)):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter.save_pretrained(folder, save_embedding_layers=along)
            sizes[name] = (Path(folder) / "adapter_model.safetensors").stat().st_size
            fresh = llama(vocabulary=500)
            torch.manual_seed(9)
            fresh.resize_token_embeddings(502, mean_resizing=False)
            found[name] = logits(graftlet.PeftModel.from_pretrained(fresh, folder), tokens)
    return {**sizes, "difference": apart(found["without"], wanted), "with": apart(found["along"], wanted)}


def tied_embeddings() -> Figures:
    """The number of weights before and after a merge into the head."""

    def grown(**options: Any) -> float:
        base = llama(vocabulary=2000, tie_word_embeddings=True)
        before = sum(p.numel() for p in base.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = stirred(lora(base, ["lm_head"], **options)).merge_and_unload()
        return sum(p.numel() for p in merged.parameters()) / before - 1

    return {"grown": grown(), "together": grown(ensure_weight_tying=True)}


def fused_experts() -> Figures:
    """An adapter with a pair an expert, by its file on the stacks and by hand on the weights."""
    from safetensors.torch import save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    def build() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
        return MixtralForCausalLM(config).eval()

    tensors, by_hand = {}, build()
    for i, layer in enumerate(by_hand.model.layers):
        for number in range(4):
            for name, (out, into) in {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items():
                A, B = torch.randn(2, into), torch.randn(out, 2) * 0.1
                key = f"base_model.model.model.layers.{i}.block_sparse_moe.experts.{number}.{name}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
                both, down = layer.mlp.experts.gate_up_proj.data[number], layer.mlp.experts.down_proj.data[number]
                (down if name == "w2" else both.chunk(2)[name == "w3"]).add_(B @ A)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        graftlet.LoraConfig(r=2, lora_alpha=2, target_modules=["w1", "w2", "w3"]).save_pretrained(folder)
        loaded = graftlet.PeftModel.from_pretrained(build(), folder)
    return {"tensors": len(tensors), "difference": apart(logits(loaded, ids(2, 8)), logits(by_hand, ids(2, 8)))}


def start_changes_base() -> Figures:
    """PiSSA: with the adapter disabled, saved as it is, and saved as plain LoRA."""
    base, tokens = llama(), ids(2, 8)
    model = lora(base, init_lora_weights="pissa")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(f"{folder}/start")
        learn(model, 1e-3, 20, SHIFT)
        wanted = logits(model, tokens)
        with model.disable_adapter():
            disabled = apart(logits(model, tokens), logits(base, tokens))
        model.save_pretrained(f"{folder}/plain", path_initial_model_for_weight_conversion=f"{folder}/start")
        model.save_pretrained(f"{folder}/naive")
        plain = graftlet.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/plain")
        naive = graftlet.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/naive")
    found = {"converted": apart(logits(plain, tokens), wanted), "naive": apart(logits(naive, tokens), wanted)}
    return {"disabled": disabled, **found}


def several_adapters_one_start() -> Figures:
    """A second adapter, new, beside a PiSSA one."""
    base, tokens = llama(), ids(2, 8)
    model = lora(base, init_lora_weights="pissa")
    model.add_adapter("second", graftlet.LoraConfig(r=8, target_modules="all-linear"))
    model.set_adapter("second")
    return {"second": apart(logits(model, tokens), logits(base, tokens))}


# several adapters


def dora_in_mixed_batches() -> Figures:
    """8 rows of 32 tokens with 4 adapters, DoRA and LoRA; and what the reference does."""
    names, tokens, found = [f"a{i % 4}" for i in range(8)], ids(8, 32), {}
    for name, use in (("lora", False), ("dora", True)):
        config = graftlet.LoraConfig(r=8, target_modules="all-linear", use_dora=use)
        model = graftlet.get_peft_model(llama(256, 4), config, "a0")
        for other in ("a1", "a2", "a3"):
            model.add_adapter(other, config)
        stirred(model)
        found[name] = milliseconds(lambda m=model: logits(m, tokens, adapter_names=names), 15)
    return {**found, "reference": _reference_on_dora(tokens[:1])}


def _reference_on_dora(tokens: Any) -> str:
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)).eval()
    try:
        model(input_ids=tokens, adapter_names=["default"])
    except Exception as error:
        return f"{type(error).__name__} ({error})"
    return "nothing"


def safe_merge() -> Figures:
    """12 layers of 512 merged with the look at the result and without; and an adapter with one NaN."""

    def model() -> Any:
        config = graftlet.LoraConfig(r=8, target_modules="all-linear")
        return stirred(graftlet.get_peft_model(layer_stack(), config))

    def merged(safe: bool) -> Any:
        held = model()
        return lambda: (held.merge_adapter(safe_merge=safe), held.unmerge_adapter())

    slower = milliseconds(merged(True), 15) / milliseconds(merged(False), 15)
    wrong = model()
    before = [p.detach().clone() for n, p in wrong.named_parameters() if "base_layer.weight" in n]
    next(p for n, p in wrong.named_parameters() if n.startswith("base_model.model.7.lora_B")).data[0, 0] = float("nan")
    try:
        wrong.merge_adapter()
        outcome = "merged"
    except graftlet.GraftletError as error:
        outcome = f"refused ({error.code})"
    after = [p for n, p in wrong.named_parameters() if "base_layer.weight" in n]
    return {
        "slower": slower,
        "outcome": outcome,
        "changed": sum(not a.equal(b) for a, b in zip(before, after, strict=True)),
    }


def merged_to_serve() -> Figures:
    """8 rows of 32 tokens with an adapter beside the weights, and merged."""
    model, tokens = stirred(lora(llama(256, 4))), ids(8, 32)
    beside = milliseconds(lambda: logits(model, tokens), 21)
    merged = model.merge_and_unload()
    return {"beside": beside, "merged": milliseconds(lambda: logits(merged, tokens), 21)}


def linear_is_no_sum() -> Figures:
    """One layer, two adapters, weights 0.7 and 0.3: what the combined adapter adds to the weight."""
    found = {}
    for kind in ("linear", "exact"):
        config = graftlet.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        model: Any = graftlet.get_peft_model(layer_stack(1, 128), config, "a")
        model.add_adapter("b", config)
        layer = model.base_model.model[0]
        wanted = 0.7 * layer.get_delta_weight("a") + 0.3 * layer.get_delta_weight("b")
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", kind)
        found[kind] = apart(layer.get_delta_weight("c"), wanted)
    return found


def hotswap_before_compile() -> Figures:
    """Graphs compiled anew at a swap to another rank and scaling."""
    from graftlet.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    def anew(prepared: bool) -> int:
        with tempfile.TemporaryDirectory() as folder:
            for name, r, alpha in (("one", 4, 8), ("two", 8, 32)):
                stirred(lora(llama(), r=r, lora_alpha=alpha)).save_pretrained(f"{folder}/{name}")
            model: Any = graftlet.PeftModel.from_pretrained(llama(), f"{folder}/one").eval()
            if prepared:
                prepare_model_for_compiled_hotswap(model, target_rank=8)
            torch._dynamo.reset()
            counted = torch._dynamo.testing.CompileCounter()
            compiled = torch.compile(model, backend=counted)
            logits(compiled, ids(2, 8))
            before = counted.frame_count
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    hotswap_adapter(compiled, f"{folder}/two", "default")
                except graftlet.GraftletError:  # another rank has no place
                    hotswap_adapter(compiled, f"{folder}/one", "default")
            logits(compiled, ids(2, 8))
            return counted.frame_count - before

    return {"prepared": anew(True), "unprepared": anew(False)}


def position_ids_with_prompts() -> Figures:
    """Logits behind a prompt of 5 tokens: positions given, not given, and shifted by two more."""
    config = graftlet.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model, tokens = graftlet.get_peft_model(llama(), config), ids(2, 8)
    positions = torch.arange(8)[None].expand(2, -1)
    plain = logits(model, tokens)
    given, shifted = (logits(model, tokens, position_ids=positions + more) for more in (0, 2))
    return {"given": apart(given, plain), "shifted": apart(shifted, plain)}


# files


def verify_the_base() -> Figures:
    """What an adapter adds to the logits of another base; and the time that the sample takes."""
    from graftlet.core import fingerprint

    def change(seed: int) -> Any:
        model = stirred(lora(llama(seed=seed)))
        with model.disable_adapter():
            without = logits(model, ids(2, 8))
        return logits(model, ids(2, 8)) - without

    own, other = change(0), change(1)
    sizes = {"num_key_value_heads": 3, "num_attention_heads": 9, "intermediate_size": 1536, "hidden_size": 576}
    config = transformers.LlamaConfig(vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True, **sizes)
    large = transformers.LlamaForCausalLM(config)
    return {"off": apart(other, own), "milliseconds": milliseconds(lambda: fingerprint.taken(large))}


def older_adapter_files() -> Figures:
    """A config as of a writer that knew twelve fields."""
    known = "alpha_pattern base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha"
    names = (known + " lora_dropout peft_type r target_modules task_type").split()
    with tempfile.TemporaryDirectory() as folder:
        model = stirred(lora(llama()))
        model.save_pretrained(folder)
        file = Path(folder) / "adapter_config.json"
        values = json.loads(file.read_text())
        new = logits(graftlet.PeftModel.from_pretrained(llama(), folder), ids(2, 8))
        file.write_text(json.dumps({k: v for k, v in values.items() if k in names}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the config is not the one that the weights were saved with
            old = logits(graftlet.PeftModel.from_pretrained(llama(), folder), ids(2, 8))
    return {"fields": len(names), "later": len(values) - len(names), "difference": float((old - new).abs().max())}


MEASURED = {
    name.replace("_", "-"): value
    for name, value in list(globals().items())
    if getattr(value, "__module__", None) == __name__
    and getattr(value, "__annotations__", {}).get("return") == "Figures"
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
        print(name, {k: v for k, v in figures.items() if not isinstance(v, dict)}, flush=True)
    found |= {
        "date": str(datetime.date.today()),
        "device": f"{_processor()}, {torch.get_num_threads()} threads",
        "cores": os.cpu_count(),
        "graftlet": graftlet.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
