# SPDX-License-Identifier: Apache-2.0
"""The effects of heuristics about models, several adapters and files: one function each. `heuristics.py` runs them."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from toys import SHIFT, apart, ids, layer_stack, learn, llama, logits, lora, milliseconds, stirred

import graftlet

Figures = dict[str, Any]

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
    names, tokens, models = [f"a{i % 4}" for i in range(8)], ids(8, 32), []
    for use in (False, True):
        config = graftlet.LoraConfig(r=8, target_modules="all-linear", use_dora=use)
        model = graftlet.get_peft_model(llama(256, 4), config, "a0")
        for other in ("a1", "a2", "a3"):
            model.add_adapter(other, config)
        models.append(stirred(model))
    plain, dora = milliseconds(*(lambda m=m: logits(m, tokens, adapter_names=names) for m in models), repeats=15)
    return {"lora": plain, "dora": dora, "reference": _reference_on_dora(tokens[:1])}


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

    looked, blind = milliseconds(merged(True), merged(False), repeats=15)
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
        "slower": looked / blind,
        "outcome": outcome,
        "changed": sum(not a.equal(b) for a, b in zip(before, after, strict=True)),
    }


def merged_to_serve() -> Figures:
    """8 rows of 32 tokens with an adapter beside the weights, and merged."""
    model, tokens = stirred(lora(llama(256, 4))), ids(8, 32)
    merged = copy.deepcopy(model).merge_and_unload()
    times = milliseconds(lambda: logits(model, tokens), lambda: logits(merged, tokens), repeats=21)
    return dict(zip(("beside", "merged"), times, strict=True))


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
    return {"off": apart(other, own), "milliseconds": milliseconds(lambda: fingerprint.taken(large))[0]}


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
