# SPDX-License-Identifier: Apache-2.0
"""GGUF: transformers makes ordinary layers of the file's numbers, so an adapter has nothing to get used to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftlet
from graftlet.testing.benches import layers, perturb
from graftlet.weights.storage import PLAIN

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

WIDTH, INNER, WORDS = 64, 96, 40
TENSORS = {
    "token_embd": (WORDS, WIDTH),
    "output": (WORDS, WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (WIDTH, WIDTH),
    "blk.0.attn_v": (WIDTH, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH),
    "blk.0.ffn_down": (WIDTH, INNER),
}


def written(place: Path, kind: str) -> Path:
    """A Llama of one block, its matrices quantised."""
    file = place / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    torch.manual_seed(0)
    form = getattr(gguf.GGMLQuantizationType, kind)
    for name, shape in TENSORS.items():
        numbers = gguf.quants.quantize((torch.randn(shape) / 8).numpy(), form)
        writer.add_tensor(f"{name}.weight", numbers, raw_dtype=form)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_an_adapter_on_a_model_from_a_file(kind: str, tmp_path: Path) -> None:
    file = written(tmp_path, kind)

    def load() -> torch.nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
        return model.eval()

    ids = torch.arange(12).reshape(2, 6)
    base = load()(ids).logits
    config = graftlet.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = graftlet.get_peft_model(load(), config)
    assert torch.equal(adapted(ids).logits, base)
    assert all(host.site.storage is PLAIN for host in layers(adapted).values())
    perturb(adapted)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    meant = adapted(ids).logits.detach()
    assert not torch.allclose(meant, base)
    adapted.save_pretrained(tmp_path / "adapter")
    again = graftlet.PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    assert torch.equal(again(ids).logits, meant)
    assert torch.allclose(again.merge_and_unload()(ids).logits, meant, atol=1e-5)
