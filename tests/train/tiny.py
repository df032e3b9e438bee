# SPDX-License-Identifier: Apache-2.0
"""A tiny chat model and tiny chat data, made on the spot: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.chat_template = template
    return made


def model(attention: str = "sdpa") -> LlamaForCausalLM:
    """A random Llama of two layers, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config)


def save(folder: Path) -> Path:
    """The model and its tokenizer in a folder."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(count: int = 48) -> list[dict[str, Any]]:
    """Sums that end in an even or an odd number."""
    return [{"text": f"{i} and {i * 7 % 13}", "label": "odd" if (i + i * 7 % 13) % 2 else "even"} for i in range(count)]


def write_jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def opening(base: Path, output: Path) -> dict[str, Any]:
    """The tables that all recipes here have in common."""
    return {
        "output": str(output),
        "model": {"source": str(base), "dtype": "float32", "device": "cpu", "threads": 1},
        "adapter": {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    }


def recipe(base: Path, data: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe's tables; `changes` are put into the tables of their names, or are one that names a method."""
    tables: dict[str, Any] = {
        **opening(base, output),
        "data": {
            "source": str(data),
            "prompt": "{text}?",
            "completion": "{label}",
            "balance": "label",
            "validation": 4,
            "test": 6,
        },
        "training": {"batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "log_every": 1},
        "evaluation": {"metric": "choice", "choices": ["odd", "even"], "samples": 2, "max_new_tokens": 4},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and key in tables and "method" not in value:
            tables[key] = {**tables[key], **value}
        else:
            tables[key] = value
    return tables
