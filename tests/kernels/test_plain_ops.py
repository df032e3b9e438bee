# SPDX-License-Identifier: Apache-2.0
"""The base's own operations on a CPU: values and gradients of the formulas, whatever the shapes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftlet.kernels import head_loss_blocks, plain_ops
from graftlet.kernels.head_loss import HeadLoss

HALF = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 2), (3, 7), (2, 5, 33), (2, 1, 64)]
WAYS = [("llama", 0.0), ("llama", 1.0), ("gemma", 0.0), ("gemma", 1.0)]


def bound(dtype: torch.dtype) -> float:
    """How far rounding may take a result that a few operations made."""
    return {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    """Fresh numbers in every other place of a longer tensor."""
    return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64).to(dtype)[..., ::2]


def compared(fused: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor) -> None:
    """Outputs and gradients, beside the formula's in double precision; what was given stays as it is."""
    given = [x.detach().clone() for x in inputs]
    ours, theirs = (
        [x.detach().to(dtype).requires_grad_() for x in inputs] for dtype in (inputs[0].dtype, torch.float64)
    )
    found, wanted = fused(*ours), plain(*theirs)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, ours, weights.to(found.dtype))
    exact = torch.autograd.grad(wanted, theirs, weights.to(found.dtype).double())
    for a, b in zip((found, *grads), (wanted, *exact), strict=True):
        assert a.dtype == inputs[0].dtype
        assert (a.double() - b).norm() <= bound(a.dtype) * (b.norm() + 0.1)
    assert all(map(torch.equal, given, inputs))


def normed(x: Tensor, W: Tensor, offset: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (offset + W)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("casting", "offset"), WAYS)
def test_a_norm(casting: str, offset: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def fused(x: Tensor, W: Tensor) -> Tensor:
        return plain_ops.Norm.apply(x, W, 1e-3, offset, casting, False)  # type: ignore[return-value]

    x, W = strided(*shape, dtype=dtype), strided(shape[-1], dtype=dtype)
    compared(fused, lambda x, W: normed(x, W, offset), x, W)


def test_a_norm_whose_weight_is_wider_gives_what_the_plain_one_gives() -> None:
    x, W = torch.randn(3, 8).bfloat16(), torch.randn(8)
    llama, gemma = (plain_ops.Norm.apply(x, W, 1e-3, 0.0, casting, False) for casting in ("llama", "gemma"))
    assert (llama.dtype, gemma.dtype) == (torch.float32, torch.bfloat16)  # type: ignore[union-attr]


PRODUCTS = {
    "silu": (plain_ops.SiLUMul, F.silu),
    "gelu": (plain_ops.GELUMul, lambda a: F.gelu(a, approximate="tanh")),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gated_product(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fused, act = PRODUCTS[name]
    compared(fused.apply, lambda a, b: act(a) * b, 3 * strided(*shape, dtype=dtype), strided(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [2, 6, 64])
@pytest.mark.parametrize("rows", [1, 2], ids=["one position a token", "each row its own"])
def test_a_rotation(rows: int, size: int, dtype: torch.dtype) -> None:
    cos, sin = (torch.randn(rows, 5, size).to(dtype) for _ in "cs")

    def plain(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None].double() + torch.cat((-high, low), -1) * sin[:, None].double()

    for which, heads in enumerate((4, 1)):
        x = strided(2, 5, heads, size, dtype=dtype).transpose(1, 2)
        compared(lambda x, which=which: plain_ops.rotary(x, x, cos, sin)[which], plain, x)


def losses(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    z = cap * torch.tanh(z / cap) if cap else z
    return F.cross_entropy(z, targets, reduction="sum")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counted", ["all", "some", "none"])
def test_the_heads_loss_is_cross_entropy(
    cap: float, bias: bool, counted: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss_blocks, "BLOCK", 1)
    monkeypatch.setattr(head_loss_blocks, "LEAST", 7)  # seven blocks, and one of a single column
    hidden, W = strided(20, 16, dtype=dtype), torch.randn(50, 16).to(dtype)
    b = torch.randn(50).to(dtype) if bias else None
    targets = torch.randint(0, 50, (20,))
    targets[{"all": slice(0), "some": slice(3, 9), "none": slice(None)}[counted]] = -100

    def plain(hidden: Tensor) -> Tensor:
        return 0.5 * losses(F.linear(hidden, W.double(), None if b is None else b.double()), targets, cap)

    def fused(hidden: Tensor) -> Tensor:
        return (0.5 * HeadLoss.apply(hidden, W, b, targets, cap)).to(dtype)  # type: ignore[operator]

    compared(fused, plain, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_nearly_certain_has_a_gradient(dtype: torch.dtype) -> None:
    """p - 1 of the target, where p is 1 to many digits."""
    hidden, W = torch.eye(2, 4).to(dtype), torch.zeros(300, 4).to(dtype)
    W[0, 0], W[299, 1] = 16.0, -90.0
    targets = torch.tensor([0, 299])
    x = hidden.clone().requires_grad_()
    HeadLoss.apply(x, W, None, targets, 0.0).backward()  # type: ignore[union-attr]
    exact = hidden.double().requires_grad_()
    losses(exact @ W.double().t(), targets, 0.0).backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=0, rtol=8 * torch.finfo(dtype).eps)


def test_a_loss_without_a_gradient_and_none_at_all() -> None:
    hidden, W, targets = torch.randn(5, 4), torch.randn(9, 4), torch.tensor([1, 8, -100, 0, 3])
    wanted = losses(hidden @ W.t(), targets, 0.0)
    torch.testing.assert_close(HeadLoss.apply(hidden, W, None, targets, 0.0), wanted)
    assert HeadLoss.apply(hidden[:0], W, None, targets[:0], 0.0) == 0


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss_blocks, "BLOCK", 1 << 12)
    made = []
    real = head_loss_blocks._add
    monkeypatch.setattr(head_loss_blocks, "_add", lambda s, z, *a: (made.append(z.numel()), real(s, z, *a))[1])
    HeadLoss.apply(torch.randn(8, 4).requires_grad_(), torch.randn(3000, 4), None, torch.arange(8), 0.0)
    assert max(made) <= 1 << 12
    assert sum(made) == 8 * 3000


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("casting", "offset"), WAYS)
def test_a_norms_derivative(casting: str, offset: float) -> None:
    torch.autograd.gradcheck(
        lambda x, W: plain_ops.Norm.apply(x, W, 1e-3, offset, casting, False), (double(2, 3, 5), double(5))
    )


@pytest.mark.parametrize("fused", [plain_ops.SiLUMul, plain_ops.GELUMul])
def test_a_gated_products_derivative(fused: Any) -> None:
    torch.autograd.gradcheck(fused.apply, (double(3, 5), double(3, 5)))


def test_a_rotations_derivative() -> None:
    cos, sin = (torch.randn(1, 3, 8, dtype=torch.float64) for _ in "cs")
    torch.autograd.gradcheck(lambda q, k: plain_ops.rotary(q, k, cos, sin), (double(2, 4, 3, 8), double(2, 2, 3, 8)))


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_heads_derivative(cap: float) -> None:
    W, targets = torch.randn(600, 5, dtype=torch.float64), torch.tensor([1, -100, 599, 256])
    torch.autograd.gradcheck(lambda hidden: HeadLoss.apply(hidden, W, None, targets, cap), (double(4, 5),))


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.97])
def test_dropout_drops_each_entry_with_its_rate_whatever_the_others_are(rate: float) -> None:
    count = 400_000
    drawn = torch.zeros(count).index_fill_(0, plain_ops._zeros(count, rate, torch.device("cpu")), 1)
    far = 6 * (rate * (1 - rate)) ** 0.5  # six standard deviations of a mean
    for part in (drawn[: count // 2], drawn[count // 2 :], drawn[::7], drawn[: count // 100]):
        assert abs(part.mean().item() - rate) < far / len(part) ** 0.5
    for apart in (1, 2, 33):  # pairs are gone together as often as by chance
        both = (drawn[apart:] * drawn[:-apart]).mean().item()
        assert abs(both - rate**2) < 6 * (rate**2 * (1 + 2 * rate) / count) ** 0.5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(1,), (0,), (3, 7), (4, 9, 16)], ids=str)
def test_dropout_is_a_product_with_one_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (strided(*shape, dtype=dtype) + 3).requires_grad_()
    y = plain_ops.Dropout.apply(x, 0.5)
    assert isinstance(y, Tensor)
    kept = y != 0
    torch.testing.assert_close(y, 2 * x * kept)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    torch.testing.assert_close(grad, 6 * torch.ones_like(y) * kept)


def test_draws_that_do_not_reach_the_end_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one are the shortest that there are: many more are needed than is likely."""
    monkeypatch.setattr(Tensor, "geometric_", lambda self, rate: self.fill_(1))
    assert torch.equal(plain_ops._zeros(5000, 0.01, torch.device("cpu")), torch.arange(5000))
