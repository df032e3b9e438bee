# SPDX-License-Identifier: Apache-2.0
"""What the measurements of heuristics share: small models, a task that they learn, and how time and memory are taken."""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

import graftlet

ATTENTION = ["q_proj", "v_proj"]
WORDS, SHIFT = 64, 7


def llama(width: int = 64, layers: int = 2, vocabulary: int = WORDS, seed: int = 0, **options: Any) -> Any:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, use_cache=False, **sizes, **options))


def lora(model: Any, targets: Any = "all-linear", **options: Any) -> Any:
    """A copy of the model with a new LoRA adapter."""
    torch.manual_seed(1)
    config = graftlet.LoraConfig(target_modules=targets, **{"r": 8, "task_type": "CAUSAL_LM", **options})
    return graftlet.get_peft_model(copy.deepcopy(model), config)


def stirred(model: Any, size: float = 0.05) -> Any:
    """The model with adapters that do something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return model.eval()


def ids(rows: int, length: int, vocabulary: int = WORDS, seed: int = 0) -> Tensor:
    """Random tokens `[rows, length]`."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def chain(step: int, seed: int, shift: int = 0) -> Tensor:
    """The task: 16 rows of 24 tokens, each of which follows from the two before; the shift makes it another task."""
    generator = torch.Generator().manual_seed(seed * 10_000 + step)
    row = torch.randint(WORDS, (16, 2), generator=generator)
    for _ in range(22):
        row = torch.cat([row, (row[:, -1:] + 3 * row[:, -2:-1] + shift) % WORDS], 1)
    return row


def learn(model: Any, rate: float, steps: int, shift: int = 0, kept: torch.dtype = torch.float32) -> float:
    """Train what can be trained, kept in a number type, and give the loss on rows that were held out."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = chain(step, 1, shift)
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            if parameter.requires_grad and kept != torch.float32:
                parameter.data.copy_(parameter.data.to(kept))
    model.eval()
    with torch.no_grad():
        held = torch.cat([chain(step, 2, shift) for step in range(8)])
        return float(model(input_ids=held, labels=held).loss)


def taught() -> Any:
    """A small model that has learnt the task as it is, unshifted."""
    model = llama()
    learn(model, 3e-3, 600)
    return model


def logits(model: Any, tokens: Tensor, **given: Any) -> Tensor:
    """What the model says, without gradients."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **given).logits


def apart(a: Tensor, b: Tensor) -> float:
    """How far apart two tensors are, as a share of the second."""
    return float((a - b).norm() / b.norm())


def milliseconds(*works: Callable[[], Any], repeats: int = 9) -> list[float]:
    """The least that each takes of some runs, in turn: what else a machine does lengthens some runs, never all."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, times in zip(works, taken, strict=True):
            begun = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - begun))
    return [min(times[1:]) for times in taken]


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and alive at once; `bytes` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.bytes = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.now += storage.nbytes()
                    self.bytes = max(self.bytes, self.now)
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def step(model: Any, tokens: Tensor, **given: Any) -> None:
    """Forward and backward; gradients are dropped."""
    model.train()
    model(input_ids=tokens, labels=tokens, **given).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def peak(work: Callable[[], Any]) -> int:
    """Bytes at the peak of what is made while it runs."""
    work()
    with Peak() as counted:
        work()
    return counted.bytes


@contextmanager
def without_kernels() -> Iterator[None]:
    """No kernels inside."""
    from graftlet.core import kernel

    os.environ[kernel.SWITCH] = "0"
    kernel.kernels.cache_clear()
    try:
        yield
    finally:
        del os.environ[kernel.SWITCH]
        kernel.kernels.cache_clear()


def layer_stack(layers: int = 12, width: int = 512) -> nn.Module:
    """Linear layers, one after another."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
