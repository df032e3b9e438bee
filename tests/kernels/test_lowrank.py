# SPDX-License-Identifier: Apache-2.0
"""Kernels are equal to the plain way: in values, in gradients, and in what they leave alone."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from graftlet import LoraConfig, get_peft_model
from graftlet.core import kernel
from graftlet.kernels import lowrank, recipe
from graftlet.methods.parts.gained import gained, row_norms
from graftlet.model import optimised as fusions

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(14).reshape(2, 7) * 4


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Turns kernels off, until the test ends."""

    def off() -> None:
        monkeypatch.setenv(kernel.SWITCH, "0")
        kernel.kernels.cache_clear()

    yield off
    monkeypatch.undo()
    kernel.kernels.cache_clear()


def model(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attention_bias=True)).to(dtype)
    made = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made.train()


def gradients(made: Any) -> tuple[float, dict[str, Tensor]]:
    made.zero_grad()
    loss = made(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 0, 32)], ids=str)
def test_one_row_and_none_are_inputs_too(shape: tuple[int, ...]) -> None:
    layer = next(m for m in model().modules() if hasattr(m, "lora_A") and m.in_features == 32)
    x = torch.randn(shape).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], layer.out_features)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 3}, {"use_dora": True}], ids=["lora", "odd", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_plain_ones(options: dict, dtype: torch.dtype, plainly: Callable[[], None]) -> None:
    made = model(dtype, **options)
    fast = gradients(made)
    plainly()
    loss, wanted = gradients(made)
    bound = 2e-5 if dtype == torch.float32 else 6e-2
    assert abs(fast[0] - loss) < bound
    assert fast[1].keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (fast[1][name] - grad).norm() <= bound * grad.norm(), name


def test_it_serves_all_layers_of_a_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    real = lowrank.product_of

    def spy(*args: Any) -> Any:
        served.append(real(*args) is not None)
        return real(*args)

    monkeypatch.setattr(lowrank, "product_of", spy)
    kernel.kernels.cache_clear()
    model()(input_ids=IDS)
    kernel.kernels.cache_clear()
    assert served == [True] * 14


def test_layers_with_one_input_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    real = lowrank.Meeting.gradient
    monkeypatch.setattr(lowrank.Meeting, "gradient", lambda self: (sums.append(len(self.parts)), real(self))[1])
    made = model()
    made.enable_input_require_grads()
    for _ in range(2):
        gradients(made)
    assert sums == [1, 2, 1, 3] * 4  # down; gate and up; o; q, k and v: of each layer, from the last


def test_nothing_is_held_that_nobody_else_holds() -> None:
    made = model()
    gradients(made)
    assert lowrank._lasts.meetings.made is None
    assert lowrank._lasts.meetings.source is None


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Linear:
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


def bound() -> nn.Linear:
    layer = nn.Linear(6, 5)
    layer.forward = lambda input: torch.zeros(len(input), 5)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("make", [lambda: Doubled(6, 5), hooked, bound], ids=["subclass", "hook", "bound"])
def test_what_is_more_than_a_product_stays_so(make: Callable[[], nn.Linear]) -> None:
    layer, x = make(), torch.randn(3, 6)
    before = layer(x)
    made = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))
    torch.testing.assert_close(made(x), before)


def test_an_output_may_be_changed_in_place() -> None:
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"]))
    y = made(torch.randn(2, 3, 6))
    y[0].mul_(2)
    y.sum().backward()
    B = made.base_model.model[0].lora_B["default"].weight
    assert B.grad is not None


def test_a_weight_that_learns_gets_its_gradient() -> None:
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"]))
    weight = made.base_model.model[0].base_layer.weight.requires_grad_()
    made(torch.randn(3, 6)).sum().backward()
    assert weight.grad is not None


def test_dropout_drops_for_the_adapter_alone() -> None:
    torch.manual_seed(0)
    made = get_peft_model(nn.Sequential(nn.Linear(400, 5)), LoraConfig(target_modules=["0"], lora_dropout=0.5))
    layer, x = made.base_model.model[0], torch.randn(3, 400)
    base = layer.base_layer(x)
    torch.testing.assert_close(made.train()(x), base)  # B is zero: the product itself sees all
    nn.init.ones_(layer.lora_B["default"].weight)
    first, second = made(x), made(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(made.eval()(x), made(x))


def test_a_tensor_that_is_made_again_is_not_kept() -> None:
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"]))
    nn.init.ones_(made.base_model.model[0].lora_B["default"].weight)
    parts = torch.randn(3, 6, requires_grad=True)
    again = []
    x = recipe.noted(parts * 2, lambda part: again.append(1) or part * 2, parts)
    made(x).sum().backward()
    A = made.base_model.model[0].lora_A["default"].weight
    found, A.grad = A.grad, None
    made((parts * 2).detach()).sum().backward()
    assert again == [1]
    torch.testing.assert_close(found, A.grad)


def product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def broadcast(a: Tensor, b: Tensor) -> Tensor:
    return a * b[:1]


def written_over(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mul_(torch.ones(6))


def of_what_is_gone(a: Tensor, b: Tensor) -> Tensor:
    y = a * b
    with torch.no_grad():
        b.add_(0)
    return y


def of_one_that_learns_nothing(a: Tensor, b: Tensor) -> Tensor:
    return a * b.detach()


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (product, False),
        (broadcast, True),
        (written_over, True),
        (of_what_is_gone, True),
        (of_one_that_learns_nothing, True),
    ],
)
def test_a_product_whose_parts_are_kept_anyway_is_made_again(
    make: Any, kept: bool, plainly: Callable[[], None]
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    A = made.base_model.model[0].lora_A["default"].weight
    a, b = (torch.randn(2, 3, 6, requires_grad=True) for _ in "ab")
    learned = [A, a] if make in (of_what_is_gone, of_one_that_learns_nothing) else [A, a, b]

    def run() -> tuple[Tensor, Tensor]:
        x = make(a.clone(), b.clone())
        return x, made(x)

    x, y = run()
    node: Any = y.grad_fn
    assert (x.data_ptr() in {t.data_ptr() for t in node.saved_tensors if t is not None}) is kept
    if make is of_what_is_gone:  # torch refuses the way back through the product itself, and not the layer's own
        learned = [A]
    found = torch.autograd.grad(y.square().sum(), learned)
    plainly()
    torch.testing.assert_close(found, torch.autograd.grad(run()[1].square().sum(), learned))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_is_not_asked_for_in_forward(reentrant: bool) -> None:
    layer, calls = nn.Linear(6, 5), []
    made = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))

    def run(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return made(a * b)

    a, b = (torch.randn(2, 3, 6, requires_grad=True) for _ in "ab")
    y = checkpoint(run, a, b, use_reentrant=reentrant)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_the_way_back_of_what_is_made_again_is_taken_with_the_layers_own(options: dict) -> None:
    torch.manual_seed(0)
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], **options))
    nn.init.ones_(made.base_model.model[0].lora_B["default"].weight)
    A = made.base_model.model[0].lora_A["default"].weight
    taken = []

    def pull(d: Tensor, dh: Tensor | None, thins: Any, parts: tuple[Tensor, ...]) -> recipe.Pulled:
        taken.append(d.shape)
        (a, b), whole = parts, d.view(parts[0].shape)
        return recipe.Pulled((a * b).flatten(0, -2), None, (whole * b, whole * a), (None, None))

    def run(pull: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        a, b = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
        x = recipe.noted(a * b, torch.mul, a, b, pull=pull)
        return list(torch.autograd.grad(made(x).square().sum(), (a, b, A)))

    wanted, found = run(None), run(pull)
    torch.testing.assert_close(found, wanted)
    assert taken == ([] if "lora_dropout" in options else [(6, 6)])


class Gated(nn.Module):
    """A gated product between layers, whose way back is taken with the last one's and finds what the first ones ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        self.asked: list[list[bool]] = []
        self.woven = True

    def forward(self, x: Tensor) -> Tensor:
        with recipe.telling():
            gate, up = self.gate(x), self.up(x)
        if not self.woven:
            return self.down(gate * up)
        return self.down(recipe.noted(gate * up, torch.mul, gate, up, pull=self.pull))

    def pull(self, d: Tensor, dh: Tensor | None, thins: Any, parts: tuple[Tensor, ...]) -> recipe.Pulled:
        self.asked.append([dh is not None, *(thin is not None for thin in thins)])
        (a, b), d = parts, d.view(parts[0].shape)
        made = (a * b).flatten(0, -2)
        for part, grad in zip(parts, (d * b, d * a), strict=True):
            part.copy_(grad)  # in its place, as the kernel does
        rows = (part.flatten(0, -2) for part in parts)
        dBs = tuple(None if t is None else t.scale * dy.t() @ t.h for dy, t in zip(rows, thins, strict=True))
        return recipe.Pulled(None if dh is not None else made, None if dh is None else dh.t() @ made, parts, dBs)


@pytest.mark.parametrize("targets", [["gate", "up", "down"], ["up", "down"], ["down"]], ids=len)
@pytest.mark.parametrize("hooked", [False, True])
def test_what_layers_ask_for_is_found_on_the_way_back_below_them(
    targets: list[str], hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Gated()
    made = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    made_alone: list[torch.Size] = []
    plain = lowrank.scaled
    monkeypatch.setattr(lowrank, "scaled", lambda a, b, *rest: made_alone.append(a.shape) or plain(a, b, *rest))
    if hooked:  # what comes out of it is another gradient than the one that was made
        model.up.register_forward_hook(lambda module, args, y: y.register_hook(lambda dy: 2 * dy) and None)
    x, found = torch.randn(2, 3, 6, requires_grad=True), []
    learned = [x, *(p for p in made.parameters() if p.requires_grad)]
    for model.woven in (False, True):
        made_alone.clear()
        found.append(torch.autograd.grad(made(x).square().sum(), learned))
    torch.testing.assert_close(found[1], found[0])
    assert model.asked == [[True, "gate" in targets, "up" in targets]]
    alone = [shape for shape in made_alone if shape == (5, 6)]  # dy^T h of gate and up
    assert len(alone) == (hooked and "up" in targets)


def test_what_nobody_comes_for_goes_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated()
    made = get_peft_model(model, LoraConfig(target_modules=["gate", "up", "down"], init_lora_weights=False))
    A = model.down.lora_A["default"].weight
    held: list[weakref.ref[recipe.Ahead]] = []
    plain = recipe.told

    def told(*given: Any) -> recipe.Ahead | None:
        if (ahead := plain(*given)) is not None:
            held.append(weakref.ref(ahead))
        return ahead

    monkeypatch.setattr(recipe, "told", told)
    gc.disable()
    try:
        y = made(torch.randn(2, 3, 6, requires_grad=True)).sum()
        torch.autograd.grad(y, A, retain_graph=True)
        del y
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_row_norms_are_those_of_the_sum() -> None:
    W, A, B = torch.randn(7, 9), torch.randn(3, 9), torch.randn(7, 3)
    for _ in range(2):
        torch.testing.assert_close(row_norms(W, A, B, 0.7), (W + 0.7 * B @ A).norm(dim=1))
        W += 1  # in place: what was kept of it is not true any more


def test_a_gain_is_a_product() -> None:
    z, gain, b = torch.randn(2, 3, 5, requires_grad=True), torch.rand(5, requires_grad=True), torch.randn(5)
    weights = torch.randn(2, 3, 5)
    wanted = torch.autograd.grad((((z - b) * gain + b) * weights).sum(), (z, gain))
    # the bias is part of z, and no gain is on it
    found = torch.autograd.grad((gained(z, gain, b) * weights).sum(), (z, gain))
    torch.testing.assert_close(found, wanted)


# the base's own operations


@pytest.mark.parametrize(
    ("kind", "config"),
    [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config), (GemmaForCausalLM, GemmaConfig)],
)
def test_a_gated_product_is_known_by_what_it_does(kind: Any, config: Any) -> None:
    mlp = kind(config(**SIZES, **HEADS, head_dim=8)).model.layers[0].mlp
    assert fusions._wired(type(mlp), mlp.act_fn)

    class Other(type(mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    assert not fusions._wired(Other, mlp.act_fn)


def test_an_attention_keeps_all_but_its_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).model.layers[0].self_attn
    called = []

    def fused(turn: Any, plain: Any, device: Any) -> Any:
        return lambda *args, **kwargs: called.append(1) or plain(*args, **kwargs)

    monkeypatch.setattr(fusions, "_rotation_of", fused)
    forward = fusions.rotation(attention)
    assert forward is not None
    x, turns = torch.randn(1, 3, 32), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    wanted = attention(x, position_embeddings=turns, attention_mask=None)[0]
    assert called == []
    torch.testing.assert_close(forward(attention, x, position_embeddings=turns, attention_mask=None)[0], wanted)
    assert called == [1]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_in_four_bits_is_read_again_for_backward(computed: torch.dtype, plainly: Callable[[], None]) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layers = [bnb.nn.Linear4bit(64, 64, compute_dtype=computed, quant_type="nf4") for _ in range(2)]
    targets = ["0", "1"]
    made = get_peft_model(nn.Sequential(*layers).to("cpu"), LoraConfig(r=4, target_modules=targets))
    for i in range(2):
        nn.init.normal_(made.base_model.model[i].lora_B["default"].weight, std=0.1)
    x = torch.randn(3, 5, 64, requires_grad=True)
    factors = [p for p in made.parameters() if p.requires_grad]

    def step() -> tuple[Tensor, ...]:
        return (y := made(x)), *torch.autograd.grad(y.square().sum(), (x, *factors))

    assert made.base_model.model[0].site.product() is not None
    fast = step()
    plainly()
    for found, wanted in zip(fast, step(), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() <= (1e-5 if computed == torch.float32 else 3e-2) * wanted.norm()


def test_a_head_is_fused_only_while_it_is_a_frozen_product() -> None:
    head = nn.Linear(6, 5).requires_grad_(False)
    assert fusions._dense(head) == (head.weight, head.bias)
    head.weight.requires_grad_()
    assert fusions._dense(head) is None  # its gradient would be lost
    assert fusions._dense(hooked().requires_grad_(False)) is None
    assert fusions._dense(Doubled(6, 5).requires_grad_(False)) is None
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"]))
    assert fusions._dense(made.base_model.model[0]) is None
