# SPDX-License-Identifier: Apache-2.0
"""Faster operations for the base model itself: norms, rotations, gated products, the head with its loss.

    optimize_model(model)        # one model object is changed, no class and no module of transformers
    restore_model(model)         # as it was

Nothing is taken on trust: each operation of the model is tried beside the fused one on a few numbers, and replaced where
both give the same. So a family that nobody thought of is served as far as it is built like the others. On CUDA they are
liger-kernel's, on a CPU our own in plain torch (`kernels/plain_ops.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.kernel import kind_of
from ..core.prompt import CACHES, IGNORED
from ..kernels import fused_shapes, plain_ops
from ..kernels.gated import pulled
from ..kernels.head_loss import HeadLoss
from ..kernels.recipe import noted, telling
from ..methods.parts import heads
from ..weights.site import site_of

Forward = Callable[..., Any]
Model = TypeVar("Model", bound=nn.Module)

PLACE = "_graftlet_optimised"


@dataclass(frozen=True)
class Optimised:
    """What was done to a model. replaced: how often each operation was. left: why others were not."""

    replaced: dict[str, int]
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = ", ".join(f"{count} {what}" for what, count in self.replaced.items()) or "nothing"
        return f"fused: {done}" + "".join(f"; {why}" for why in self.left)


def optimize_model(model: Model) -> Model:
    """Let a transformers model compute with fused operations where they are equal; the model itself is returned.

    Adapters, their keys, merging and saving stay as they are. In training with labels, a causal language model gives its
    loss and no logits. `optimised(model)` says what was done. Nothing is on other devices than CUDA, which needs Triton and
    liger-kernel, and a CPU, which needs neither.
    """
    core = _core(model)
    if PLACE in core.__dict__:
        return model
    why = unavailable(core)
    replaced: Counter[str] = Counter()
    if why is None:
        fusions = FUSIONS | (ON_A_CPU if kind_of(next(core.parameters())) == "cpu" else {})
        for module in list(core.modules()):
            for what, found in fusions.items():
                if "forward" not in module.__dict__ and (forward := found(module)) is not None:
                    module.__dict__["forward"] = types.MethodType(forward, module)
                    replaced[what] += 1
                    break
    core.__dict__[PLACE] = Optimised(dict(replaced), () if why is None else (why,))
    return model


def restore_model(model: Model) -> Model:
    """Take back what `optimize_model` did; the model itself is returned."""
    core = _core(model)
    if core.__dict__.pop(PLACE, None) is not None:
        for module in core.modules():
            if isinstance(module.__dict__.get("forward"), types.MethodType) and hasattr(module.forward, MARK):
                del module.__dict__["forward"]
    return model


def optimised(model: nn.Module) -> Optimised | None:
    """What `optimize_model` did to a model; None where it was not called."""
    return _core(model).__dict__.get(PLACE)


def unavailable(model: nn.Module) -> str | None:
    """Why fused operations cannot run for a model here; None where they can."""
    parameter = next(model.parameters())
    if (kind := kind_of(parameter)) == "cpu":
        return None
    if kind != "cuda":
        return f"the model is on {kind}, and the fused operations need CUDA or a CPU"
    for package in () if parameter.is_meta else ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {package.replace('_', '-')}"
    return None


def _core(model: nn.Module) -> nn.Module:
    """The transformers model inside what is around it."""
    found = getattr(model, "get_base_model", None)
    return found() if found is not None else model


MARK = "_graftlet_fused"


def marked(forward: Forward) -> Forward:
    """A forward of ours, to know it by."""
    setattr(forward, MARK, True)
    return forward


PLACES = {
    "norm": ("liger_kernel.ops.rms_norm:LigerRMSNormFunction", "Norm"),
    "silu": ("liger_kernel.ops.swiglu:LigerSiLUMulFunction", "SiLUMul"),
    "gelu": ("liger_kernel.ops.geglu:LigerGELUMulFunction", "GELUMul"),
    "rotary": ("liger_kernel.transformers.rope:liger_rotary_pos_emb", "rotary"),
}
"""Where each fused operation of CUDA is, and the name of what it is on a CPU, and of what stands for it without data."""


def _fused(name: str, device: torch.device) -> Any:
    place, ours = PLACES[name]
    if (kind := kind_of(torch.empty(0, device=device))) == "cpu" or device.type == "meta":
        return getattr(plain_ops if kind == "cpu" else fused_shapes, ours)
    home, _, attribute = place.partition(":")
    return getattr(importlib.import_module(home), attribute)


def _trial(device: torch.device) -> torch.device:
    """Where an operation is tried: numbers are needed for that."""
    return torch.device("cpu") if device.type == "meta" else device


# norms

CASTS = [("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0), ("llama", 1.0)]


def norm(module: nn.Module) -> Forward | None:
    """An RMS norm, whichever of the ways of rounding and of counting its weight it has."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    fused = _fused("norm", weight.device)
    return _norm_of(fused, type(module), weight.dtype, _trial(weight.device), len(weight), eps)


@functools.cache
def _norm_of(fused: Any, kind: type, dtype: torch.dtype, device: torch.device, size: int, eps: float) -> Forward | None:
    x, W = (torch.randn(*shape, device=device).to(dtype) for shape in ((5, size), (size,)))
    stand_in: Any = nn.Module.__new__(kind)
    nn.Module.__init__(stand_in)
    stand_in.weight = nn.Parameter(W)
    for name in ("variance_epsilon", "eps"):
        setattr(stand_in, name, eps)
    with torch.no_grad():
        wanted = stand_in(x)
        for cast_, offset in CASTS:
            if close(fused.apply(x, W, eps, offset, cast_, False), wanted):
                break
        else:
            return None

    def again(x: Tensor, W: Tensor) -> Tensor:
        with torch.no_grad():
            return fused.apply(x, W, eps, offset, cast_, False)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        made = fused.apply(hidden_states, self.weight, eps, offset, cast_, False)
        if not torch.is_grad_enabled() or kind_of(made) == "cpu":  # there, time counts for more than memory
            return made
        return noted(made, again, hidden_states, self.weight)

    return marked(forward)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are the same but for rounding, in their own dtype."""
    bound = 4 * torch.finfo(wanted.dtype).eps
    return found.dtype == wanted.dtype and bool(((found - wanted).norm() <= bound * wanted.norm()).item())


# gated products


def gated(module: nn.Module) -> Forward | None:
    """`down(act(gate(x)) * up(x))`, the product being made again for backward, not kept."""
    if not all(name in module._modules for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    act = getattr(module, "act_fn", None)
    name = _activation(act)
    if name is None or not _wired(type(module), cast(nn.Module, act)):
        return None
    parameter = next(module.parameters())
    multiply = _fused(name, parameter.device)
    pull = functools.partial(pulled, name) if kind_of(parameter) == "cuda" else None

    def forward(self: Any, x: Tensor) -> Tensor:
        with telling():
            gate, up = self.gate_proj(x), self.up_proj(x)
        made = multiply.apply(gate, up)
        return self.down_proj(noted(made, functools.partial(_again, multiply), gate, up, pull=pull))

    return marked(forward)


def _again(multiply: Any, gate: Tensor, up: Tensor) -> Tensor:
    with torch.no_grad():
        return multiply.apply(gate, up)


def _activation(act: Any) -> str | None:
    """The name of an activation, by what it does."""
    if not callable(act):
        return None
    x = torch.linspace(-4, 4, 33)
    known = {"silu": F.silu, "gelu": _tanh_gelu}
    return next(
        (name for name, plain in known.items() if torch.allclose(cast(Tensor, act(x)), plain(x), atol=1e-6)), None
    )


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _wired(kind: type, act: nn.Module) -> bool:
    """Whether a class's forward is that product: tried with plain numbers in the layers' place."""
    stand_in = types.SimpleNamespace(
        gate_proj=lambda x: 2 * x, up_proj=lambda x: 3 - x, down_proj=lambda x: 5 * x, act_fn=act, config=None
    )
    x = torch.linspace(-2, 2, 9)
    try:
        found = kind.forward(stand_in, x)
    except Exception:  # it needs more than these: it is another product
        return False
    return isinstance(found, Tensor) and torch.allclose(found, 5 * (act(2 * x) * (3 - x)))


# rotations

ROTATION = "apply_rotary_pos_emb"


def rotation(module: nn.Module) -> Forward | None:
    """An attention's own forward, but for the function that turns queries and keys by their positions."""
    plain = inspect.unwrap(type(module).forward)
    if not isinstance(plain, types.FunctionType) or ROTATION not in plain.__code__.co_names:
        return None
    device = next(module.parameters()).device
    fused = _rotation_of(_fused("rotary", device), plain.__globals__.get(ROTATION), _trial(device))
    if fused is None:
        return None
    scope = {**plain.__globals__, ROTATION: fused}
    forward = types.FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return marked(forward)


@functools.cache
def _rotation_of(fused: Any, plain: Any, device: torch.device) -> Any:
    if not callable(plain):
        return None
    q, k = torch.randn(2, 4, 3, 16, device=device), torch.randn(2, 2, 3, 16, device=device)
    cos, sin = (torch.randn(2, 3, 8, device=device).repeat(1, 1, 2) for _ in "cs")
    try:
        wanted: Any = plain(q.clone(), k.clone(), cos, sin)
    except Exception:  # another signature, another rotation
        return None
    found = fused(q.clone(), k.clone(), cos, sin)
    if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True)):
        return None

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As tried: all of each head, which is the second axis."""
        tried = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        turn: Any = fused if tried else plain
        return turn(q, k, cos, sin, *args, **kwargs)

    return turned


# the head and its loss


def headed(module: nn.Module) -> Forward | None:
    """A causal language model: in training its loss is computed with the head, and the logits are never all there."""
    head, body = module._modules.get("lm_head"), getattr(module, "model", None)
    if head is None or body is None or not _plain_loss(module) or hasattr(module.config, "router_aux_loss_coef"):
        return None
    plain = type(module).forward
    cap = getattr(module.config, "final_logit_softcapping", None)

    def forward(self: Any, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        kept = {"labels": labels, "logits_to_keep": logits_to_keep}
        trains = self.training and kwargs.get("return_dict", True) is not False
        dense = _dense(self.lm_head) if trains else None
        if labels is None or dense is None:
            return plain(self, *args, **kept, **kwargs)
        loss_arguments = {n: kwargs.pop(n) for n in ("num_items_in_batch", "shift_labels") if n in kwargs}
        outputs = self.model(*args, **{**kwargs, "return_dict": True})
        loss = head_loss(heads.kept(outputs[0], logits_to_keep), *dense, labels, cap=cap, **loss_arguments)
        return _answer(loss, outputs)

    return marked(forward)


def _dense(head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of a head that is a frozen product with them and nothing else; None where it is more."""
    site = site_of(head)
    product = None if site is None else site.product()
    return (product.W, product.b) if product is not None and isinstance(product.W, Tensor) else None


def _plain_loss(module: nn.Module) -> bool:
    return getattr(getattr(module, "loss_function", None), "__name__", "") == "ForCausalLMLoss"


def head_loss(
    hidden: Tensor,
    W: Tensor,
    b: Tensor | None,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """The causal loss of hidden states `[rows, tokens, features]` and a head, as transformers' own is of their logits."""
    targets = heads.targets(labels, shift_labels).to(hidden.device)
    total = HeadLoss.apply(hidden.flatten(0, -2), W, b, targets, cap or 0.0)
    counted = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return cast(Tensor, total) / counted


def _answer(loss: Tensor, outputs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    known = inspect.signature(CausalLMOutputWithPast).parameters
    caches = {name: outputs.get(name) for name in CACHES if name in known}
    return CausalLMOutputWithPast(
        loss=loss, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions"), **caches
    )


FUSIONS: dict[str, Callable[[nn.Module], Forward | None]] = {
    "norms": norm,
    "gated products": gated,
    "rotations": rotation,
    "heads": headed,
}


# dropout


def dropout(module: nn.Module) -> Forward | None:
    """A module that drops entries of its input: others than the plain one would have from the same seed."""
    if type(module) is not nn.Dropout or module.inplace or not 0 < module.p < 1:
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and kind_of(input) == "cpu":
            return cast(Tensor, plain_ops.Dropout.apply(input, self.p))
        return F.dropout(input, self.p, self.training)

    return marked(forward)


ON_A_CPU: dict[str, Callable[[nn.Module], Forward | None]] = {"dropouts": dropout}
