# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Adapter: gated attention to a prompt (arXiv 2303.16199).   attn(x) + W_o (g softmax(q K(P)^T / sqrt d) V(P))

In the last layers, the block's own queries also attend to a prompt P `[1, tokens, hidden]` through the block's own keys
and values; the gate g `[1]` starts at zero.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.around import Block, Held
from ..core.method import Spec
from ..errors import ConfigError, UnsupportedLayerError
from ..registry import method
from ..weights.whole import shape_of

SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
PACKED = ("c_attn", "c_proj")


@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter.

    Args:
        target_modules: what the attention blocks are called; None: self_attn, or attn in GPT-2.
        adapter_len: the prompt's tokens in each layer. adapter_layers: how many layers have one, from the last up.
    """

    target_modules: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  one name here
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def check(self) -> None:
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            self.require(value is None or value > 0, f"{name}={value}; a positive number is needed.")


@method("adaption_prompt", AdaptionPromptConfig)
class AdaptionPrompt(Block):
    unmergeable = "its prompt is attended to, which no weight can stand for"

    def choose(self, paths: list[str], config: PeftConfig) -> list[str]:
        assert isinstance(config, AdaptionPromptConfig)
        for name in ("adapter_len", "adapter_layers"):
            config.require(getattr(config, name) is not None, f"{name} is not given; a positive number is needed.")
        count = config.adapter_layers or 0
        if count > len(paths):
            raise ConfigError(
                f"AdaptionPromptConfig.adapter_layers={count}, but the model has {len(paths)} such layers."
            )
        return paths[-count:]

    def params(self, block: nn.Module, config: PeftConfig, model: nn.Module) -> dict[str, Spec]:
        assert isinstance(config, AdaptionPromptConfig)
        names = SEPARATE if _has(block, SEPARATE) else PACKED
        if not _has(block, names) or _has(block, ("q_norm",)):
            raise UnsupportedLayerError(
                f"ADAPTION_PROMPT cannot adapt a {type(block).__name__}: attention blocks with {', '.join(SEPARATE)} "
                f"(as in Llama and Mistral) or {', '.join(PACKED)} (GPT-2), without norms of the queries, are known."
            )
        known: Any = block
        hidden = shape_of(known.o_proj.weight)[0] if names is SEPARATE else known.c_proj.nf
        return {"adaption_prompt": Spec((1, config.adapter_len or 0, hidden)), "adaption_gate": Spec((1,))}

    def init(self, tensors: dict[str, Tensor], config: PeftConfig) -> None:
        tensors["adaption_prompt"].normal_()
        tensors["adaption_gate"].zero_()

    def call(self, p: Held, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        output, *rest = block(*args, **kwargs)
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        x = given["hidden_states"]
        prompt, gate = p["adaption_prompt"], p["adaption_gate"]
        q, k, v, project = _parts(block, x, prompt.to(x.dtype), _angles(given))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        odds = gate * scores.softmax(-1, dtype=torch.float32).to(gate.dtype)
        seen = (odds.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return (output + project(seen).to(output.dtype), *rest)


def _has(block: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(block, n, None), nn.Module) for n in names)


def _angles(given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    return given.get("position_embeddings") or given.get("kwargs", {}).get("position_embeddings")


def _parts(block: Any, x: Tensor, prompt: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Queries of x; keys and values of the prompt, `[1, heads, tokens, size]`; the output projection."""
    if _has(block, SEPARATE):
        size = block.head_dim
        q, k, v = heads(block.q_proj(x), size), heads(block.k_proj(prompt), size), heads(block.v_proj(prompt), size)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return (q if angles is None else turned(q, *angles)), k, v, block.o_proj
    size = block.head_dim
    q = block.c_attn(x).chunk(3, -1)[0]
    _, k, v = block.c_attn(prompt).chunk(3, -1)
    return heads(q, size), heads(k, size), heads(v, size), nn.Identity()  # the format's GPT-2 has no projection here


def heads(x: Tensor, size: int) -> Tensor:
    """`[batch, tokens, heads * size]` as `[batch, heads, tokens, size]`."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def turned(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, by halves."""
    low, high = q.chunk(2, -1)
    return q * cos.unsqueeze(1) + torch.cat([-high, low], -1) * sin.unsqueeze(1)
