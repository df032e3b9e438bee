# SPDX-License-Identifier: Apache-2.0
"""The layers that laws and comparisons are run on: one small model for each kind of site, with inputs for it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.host import commons, hosts
from ..core.layer import AdaptedLayer
from ..core.prompt import Prompt
from ..core.tensors import Box
from ..weights import site as sites

BATCH = 4
INNER, OUTER, TOKENS = 8, 12, 10


class Around(nn.Module):
    """A model of one layer, with a norm that no adapter touches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.l = layer
        self.rest = nn.LayerNorm(3)

    def forward(self, *args: Any, **unread: Any) -> Tensor:
        y = self.l(*args)  # other arguments are let pass, as transformers' models do
        return y[0] if isinstance(y, tuple) else y


class Experts(nn.Module):
    """A stack of two-layer experts, each token through all of them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        up, down = (3, OUTER, INNER), (3, INNER, OUTER)
        self.up = nn.Parameter(torch.randn(down if is_transposed else up) / 4)
        self.down = nn.Parameter(torch.randn(up if is_transposed else down) / 4)
        if is_transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up.mT, self.down.mT) if hasattr(self, "is_transposed") else (self.up, self.down)
        return torch.einsum("...i,eoi,eno->...n", x, up, down)


class Projection(nn.Module):
    """A module that multiplies by a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(OUTER, INNER) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class ScaledEmbedding(nn.Embedding):
    """An embedding as Gemma has it: rows are multiplied by a constant as they are looked up."""

    embed_scale = 1.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@dataclass(frozen=True)
class Bench:
    """One kind of layer. kind: its site's class; targets: how a config names it; batch: the inputs' batch dimension.

    needs: a package that has the layer's class. narrow: the layer cannot hold every weight or bias, so that it may refuse
        an adapter or its merged form.
    """

    name: str
    kind: type
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["l"]})
    batch: int = 0
    common: bool = True
    """Not a variation on another bench: part of the quick runs."""
    needs: str = "torch"
    narrow: bool = False

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model, the same for the same seed, in evaluation mode."""
        with seeded(seed):
            return Around(self.make()).to(dtype).eval()

    def example(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, ...]:
        """Inputs for it, the same for the same seed."""
        with seeded(seed):
            return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())


class Decoder:
    """The kind of a whole model that makes text, for methods that act beside its layers or on its blocks."""


class WholeBench(Bench):
    """A whole model of transformers in place of a layer."""

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        with seeded(seed):
            return self.make().to(dtype).eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from `seed`, and afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def biased(layer: nn.Module) -> nn.Module:
    """With biases as training leaves them: new ones may be zero, so that what multiplies them does nothing."""
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return layer


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return biased(Conv1D(OUTER, INNER))


def _rows() -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, INNER),)


def _ids() -> tuple[Tensor, ...]:
    return (torch.randint(0, TOKENS, (BATCH, 5)),)


def _attention() -> tuple[Tensor, ...]:
    return tuple(torch.randn(BATCH, 5, INNER) for _ in range(3))


def _decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=INNER, intermediate_size=OUTER, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _image(dims: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(BATCH, INNER, *[5] * dims),)


_PARAMETERS = {"target_modules": []}

BENCHES: dict[str, Bench] = {
    b.name: b
    for b in [
        Bench("linear", sites.Linear, lambda: nn.Linear(INNER, OUTER), _rows),
        Bench("conv1d", sites.Conv1D, _transposed, _rows, needs="transformers"),
        Bench("conv2", sites.Conv, lambda: nn.Conv2d(INNER, OUTER, 3, padding=1), _image(2)),
        Bench("grouped", sites.Conv, lambda: nn.Conv2d(INNER, OUTER, 3, groups=2), _image(2), narrow=True),
        Bench("embedding", sites.Embedding, lambda: nn.Embedding(TOKENS, OUTER), _ids),
        Bench(
            "attention",
            sites.Attention,
            lambda: biased(nn.MultiheadAttention(INNER, 2, batch_first=True)),
            _attention,
        ),
        Bench("matrix", sites.Parameter, Projection, _rows, {**_PARAMETERS, "target_parameters": ["l.matrix"]}),
        Bench("experts", sites.Parameter, Experts, _rows, {**_PARAMETERS, "target_parameters": ["l.up", "l.down"]}),
        # variations
        Bench("no-bias", sites.Linear, lambda: nn.Linear(INNER, OUTER, bias=False), _rows, common=False, narrow=True),
        Bench("conv1", sites.Conv, lambda: nn.Conv1d(INNER, OUTER, 3, stride=2), _image(1), common=False),
        Bench("conv3", sites.Conv, lambda: nn.Conv3d(INNER, OUTER, 2), _image(3), common=False),
        Bench("pointwise", sites.Conv, lambda: nn.Conv2d(INNER, OUTER, 1), _image(2), common=False),
        Bench(
            "dilated",
            sites.Conv,
            lambda: nn.Conv2d(INNER, OUTER, 3, padding="same", dilation=2, padding_mode="circular"),
            _image(2),
            common=False,
        ),
        Bench("scaled-embedding", sites.Embedding, lambda: ScaledEmbedding(TOKENS, OUTER), _ids, common=False),
        Bench(
            "padded-embedding",
            sites.Embedding,
            lambda: nn.Embedding(TOKENS, OUTER, padding_idx=0),
            _ids,
            common=False,
        ),
        Bench(
            "attention-time-first",
            sites.Attention,
            lambda: biased(nn.MultiheadAttention(INNER, 2)),
            lambda: tuple(torch.randn(5, BATCH, INNER) for _ in range(3)),
            batch=1,
            common=False,
        ),
        Bench(
            "experts-transposed",
            sites.Parameter,
            lambda: Experts(is_transposed=True),
            _rows,
            {**_PARAMETERS, "target_parameters": ["l.up", "l.down"]},
            common=False,
        ),
    ]
    if importlib.util.find_spec(b.needs)
}


WHOLE: dict[str, Bench] = {
    b.name: b
    for b in [WholeBench("decoder", Decoder, _decoder, _ids, {"task_type": "CAUSAL_LM"}, needs="transformers")]
    if importlib.util.find_spec(b.needs)
}
"""For methods on whole models: prompts, and those around blocks."""


def layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of a model, by path."""
    return {path: host for path, host in hosts(model) if isinstance(host, AdaptedLayer)}


def learning(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """All that an adapter trains, in a fixed order: what each layer or block has, then what they share, then its prompt."""
    own = [h.trainable(adapter) for _, h in hosts(model) if adapter in h.adapters]
    found = [tensors[key] for tensors in own for key in sorted(tensors)]
    shared = [box.tensors(adapter) for _, box in commons(model)]
    found += [t for tensors in shared for t in tensors.values() if isinstance(t, nn.Parameter)]
    own_prompt = prompt_of(model, adapter)
    held = [] if own_prompt is None else own_prompt.named_parameters()
    return found + [p for n, p in held if own_prompt is not None and not n.startswith(own_prompt.frozen)]


def prompt_of(model: nn.Module, adapter: str = "default") -> Prompt | None:
    """What a prompt method puts before a model's input; None for a method of another kind."""
    box = model._modules.get("prompt_encoder")
    return cast(Prompt, box[adapter]) if isinstance(box, Box) and adapter in box else None


@torch.no_grad()
def perturb(model: nn.Module, adapter: str = "default", seed: int = 2, by: float = 0.2) -> None:
    """Move all that an adapter trains away from where it started, as training would."""
    with seeded(seed):
        for tensor in learning(model, adapter):
            tensor.add_((torch.randn(tensor.shape) * by).to(tensor.device))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all of a model's tensors."""
    return {k: t.clone() for k, t in model.state_dict().items()}


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares nothing with it."""
    return copy.deepcopy(model)


def near(a: Tensor, b: Tensor, dtype: torch.dtype, steps: float = 8, what: str = "two outputs") -> None:
    """Assert that two outputs agree within some rounding steps of `dtype` at their own size."""
    eps = max(torch.finfo(dtype).eps, 4e-7)
    scale = max(1.0, float(b.abs().max()))
    agree(a.double(), b.double(), steps * eps * scale, what)


def agree(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Assert that no entry differs by more than `tolerance`."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda found: f"expected: {what}. {found}")
