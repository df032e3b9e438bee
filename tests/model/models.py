# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and what the tests of whole models do with them. Nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graftlet

SIZES: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(1, 11).reshape(2, 5)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 1, **changes})).eval()


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_embd": 8, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SIZES, **changes})).eval()


def t5(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, **changes})).eval()


def falcon(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})).eval()


class Net(nn.Module):
    """A model that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def lora(lib: Any = graftlet, **values: Any) -> Any:
    return lib.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **values})


def adapted(model: nn.Module, config: Any, lib: Any = graftlet) -> Any:
    """A model with an adapter, in evaluation mode; no warning is given."""
    with silent():
        return lib.get_peft_model(model, config).eval()


def load(model: nn.Module, folder: Any, lib: Any = graftlet, **options: Any) -> Any:
    """A saved adapter on a model; no warning is given."""
    with silent():
        return lib.PeftModel.from_pretrained(model, folder, **options).eval()


def save(model: Any, folder: Any, **options: Any) -> None:
    with silent():
        model.save_pretrained(folder, **options)


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def move(model: nn.Module, by: float = 0.1) -> None:
    """Move what learns, each piece of memory once, alike wherever the names are alike."""
    torch.manual_seed(3)
    done: set[int] = set()
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and parameter.data_ptr() not in done:
            done.add(parameter.data_ptr())
            parameter.add_(torch.randn(parameter.shape) * by)


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model(**(inputs or {"input_ids": IDS})).logits


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def facts(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed operation must leave as it was: the module tree, the flags, and every tensor's bits."""
    tree = [(name, type(module), id(module)) for name, module in model.named_modules()]
    tensors = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return tree, learning(model), tensors


def same(before: tuple[Any, ...], model: nn.Module) -> bool:
    tree, flags, tensors = facts(model)
    kept = before[2].keys() == tensors.keys() and all(
        before[2][k][0] == tensors[k][0] and torch.equal(before[2][k][1], tensors[k][1]) for k in tensors
    )
    return before[0] == tree and before[1] == flags and kept


Build = Callable[..., Any]
