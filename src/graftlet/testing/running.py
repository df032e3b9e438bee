# SPDX-License-Identifier: Apache-2.0
"""What the laws are written with: a case's model with adapters on it, its output, and expectations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..core.prompt import Prompt
from ..model.mapping import get_peft_model
from ..model.peft_model import PeftModel
from .benches import agree, layers, perturb, seeded
from .case import Case

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def expect(condition: object, what: str) -> None:
    """Raise `AssertionError` with what was expected, also where Python runs without assertions."""
    if not condition:
        raise AssertionError(f"expected: {what}")


def refuses(error: type[Exception], work: Callable[[], Any], what: str) -> None:
    """Expect that `work` raises `error`."""
    try:
        work()
    except error:
        return
    raise AssertionError(f"expected: {what}, by a {error.__name__}; nothing was raised")


def same(a: Tensor, b: Tensor, what: str = "two runs of one computation agree") -> None:
    """Expect that two runs of one computation agree; blocked kernels may differ in the last bit by where memory lies."""
    agree(a, b, 2e-6, what)


def unchanged(before: Mapping[str, Tensor], after: Mapping[str, Tensor], what: str) -> None:
    """Expect the very same bits under the very same keys."""
    expect(before.keys() == after.keys(), f"{what}: the same tensors, not others: {before.keys() ^ after.keys()}")
    for key in before:
        expect(torch.equal(before[key], after[key]), f"{what}: {key} as it was, to the bit")


def scratch() -> TemporaryDirectory[str]:
    """A folder for a while. Where tensors are still mapped from its files, some systems cannot remove it."""
    return TemporaryDirectory(ignore_cleanup_errors=True)


def fresh(case: Case, dtype: torch.dtype = SINGLE, name: str = "default", **changes: Any) -> PeftModel:
    """The case's model with one new adapter."""
    with seeded(3):
        return get_peft_model(case.bench.model(dtype), case.config(**changes), name).eval()


def adapted(case: Case, dtype: torch.dtype = SINGLE, name: str = "default", **changes: Any) -> PeftModel:
    """The case's model with one trained adapter."""
    model = fresh(case, dtype, name, **changes)
    perturb(model, name)
    return model


def second(model: PeftModel, case: Case, name: str = "other") -> None:
    """Another trained adapter of the same method."""
    with seeded(4):
        model.add_adapter(name, case.config(**case.other))
    perturb(model, name, seed=5)
    model.eval()


@torch.no_grad()
def run(model: Callable[..., Any], case: Case, dtype: torch.dtype = SINGLE, **kwargs: Any) -> Tensor:
    """A model's output for the case's example."""
    return output(model, case, dtype, **kwargs)


def output(model: Callable[..., Any], case: Case, dtype: torch.dtype = SINGLE, **kwargs: Any) -> Tensor:
    """That with a gradient; of a whole model the logits of the call's own tokens."""
    given = case.bench.example(dtype)
    found = model(*given, **case.call, **kwargs)
    return found.logits[:, -given[0].shape[1] :] if case.whole else found


def loss(model: Callable[..., Any], case: Case) -> Tensor:
    """A whole model's own loss, to which a method may add; of a layer one that every entry of its output counts in."""
    given = case.bench.example()
    if case.whole:
        return model(*given, labels=given[0], **case.call).loss
    y = output(model, case)
    return (y * torch.randn_like(y)).sum()


@torch.no_grad()
def base_output(case: Case, dtype: torch.dtype = SINGLE) -> Tensor:
    """The output without any adapter."""
    bare = case.bench.model(dtype)
    return output(bare, replace(case, call={}), dtype)


def stripped(model: PeftModel, case: Case) -> nn.Module:
    """A copy of a model's base without its adapters."""
    copied = copy.deepcopy(model)
    return copied.get_base_model() if issubclass(case.entry.method, Prompt) else copied.unload()


@torch.no_grad()
def by_weight(model: PeftModel, case: Case, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> Tensor:
    """The base model's output, in double precision, with these weights in place of its own."""
    bare = copy.deepcopy(model).unload().double()
    for key, (W, b) in weights.items():
        site = layers(model)[key].site
        owner = bare.get_submodule(
            key.removeprefix("base_model.model.").replace("base_layer.", "").removesuffix(".base_layer")
        )
        shape = getattr(owner, site.name).shape
        kept = site.kept(W).double()
        expect(kept.shape == shape, f"a transformed weight of shape {list(shape)}, not {list(kept.shape)}")
        setattr(owner, site.name, nn.Parameter(kept))
        if b is not None and site.bias is not None:
            setattr(owner, site.bias, nn.Parameter(b.double()))
    return bare(*(x.double() if x.is_floating_point() else x for x in case.bench.example()))


def merged_weights(model: PeftModel) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The weight and bias of each layer as its adapter transforms them."""
    return {key: layer.merged_weight(["default"]) for key, layer in layers(model).items()}


def gradients(call: Callable[..., Tensor], model: PeftModel, case: Case) -> dict[str, Tensor]:
    """The gradients of a loss of `call`, which runs `model`, by parameter."""
    model.zero_grad()
    output(call, case).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
