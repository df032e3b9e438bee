# SPDX-License-Identifier: Apache-2.0
"""How weights are kept: every back end that runs here reads, writes and brings back a weight as it says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graftlet
from graftlet.weights.site import Linear, site_of
from graftlet.weights.storage import PLAIN, storage_of

from .backends import BACKENDS, Backend, four_bit

OUT, IN = 96, 128


def bits(layer: nn.Module) -> dict[str, bytes]:
    """All that a layer keeps, as it is kept."""
    return {k: packed(v) for k, v in layer.state_dict().items() if isinstance(v, torch.Tensor)}


def packed(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, or of all the tensors that one of a special kind consists of."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:
        return b"".join(packed(getattr(tensor, name)) for name in parts()[0])
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def test_a_quantised_layer_is_a_linear_site(backend: Backend) -> None:
    plain = nn.Linear(IN, OUT)
    site = site_of(backend.make(plain))
    assert isinstance(site, Linear)
    assert site.storage is not PLAIN
    assert site.storage.backend
    assert site.shape == (OUT, IN)
    assert (site.features_out, site.features_in, site.has_bias) == (OUT, IN, True)
    assert site.dtype.is_floating_point
    assert site.device == torch.device("cpu")


def test_what_is_read_is_what_the_layer_computes_with(backend: Backend) -> None:
    layer = backend.make(nn.Linear(IN, OUT))
    site = site_of(layer)
    assert site is not None
    W, b = site.read()
    assert (W.shape, W.dtype) == ((OUT, IN), site.dtype)
    x = torch.randn(5, IN)
    expected = nn.functional.linear(x, W.float(), b.float() if b is not None else None)
    assert (layer(x) - expected).abs().max() <= backend.call * expected.abs().max()


def test_a_weight_that_is_written_is_read_back_to_its_precision(backend: Backend) -> None:
    site = site_of(backend.make(nn.Linear(IN, OUT)))
    assert site is not None
    meant = torch.randn(OUT, IN) / 5
    before = site.weight
    site.write(meant, None)
    found = site.read()[0]
    assert 0 < (found - meant).norm() / meant.norm() <= backend.rounding
    assert type(site.weight) is type(before)


def test_what_was_saved_comes_back_to_the_bit(backend: Backend) -> None:
    layer = backend.make(nn.Linear(IN, OUT))
    site = site_of(layer)
    assert site is not None
    state = bits(layer)
    x = torch.randn(5, IN)
    W, y = site.read()[0].clone(), layer(x)
    saved = site.save()
    site.write(torch.randn(OUT, IN), None)
    assert not torch.equal(layer(x), y)
    assert torch.equal(site.original(saved)[0], W)
    assert not torch.equal(site.read()[0], W)
    site.restore(saved)
    assert torch.equal(site.read()[0], W)
    assert torch.equal(layer(x), y)
    assert bits(layer) == state


def test_a_copy_shares_nothing(backend: Backend) -> None:
    if not backend.copies:
        pytest.skip("the back end's own tensors cannot be copied")
    layer = backend.make(nn.Linear(IN, OUT))
    other = copy.deepcopy(layer)
    site, twin = site_of(layer), site_of(other)
    assert site is not None
    assert twin is not None
    W = site.read()[0].clone()
    twin.write(torch.randn(OUT, IN), None)
    assert torch.equal(site.read()[0], W)
    assert not torch.equal(twin.read()[0], W)


def test_an_ordinary_layer_is_plain() -> None:
    assert storage_of(nn.Linear(2, 2)) is PLAIN
    assert storage_of(nn.LayerNorm(2)) is PLAIN
    assert storage_of(nn.Identity()) is PLAIN


@pytest.mark.parametrize("nested", [False, True])
def test_on_a_cpu_for_which_bitsandbytes_has_a_layout_of_its_own(nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes lays weights out anew on CPUs with AVX512-BF16, which this one has not")
    torch.manual_seed(0)
    base = nn.Sequential(four_bit("nf4", nested)(nn.Linear(IN, OUT))).eval()
    base[0].support_avx512bf16_for_cpu = True
    x = torch.randn(4, IN)
    wanted = base(x)
    assert base[0].weight.quant_state.packing_format_for_cpu
    config = graftlet.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = graftlet.get_peft_model(base, config).eval()
    y, site = model(x), site_of(base[0].base_layer)
    assert site is not None
    with model.disable_adapter():
        assert torch.equal(model(x), wanted)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    W = site.read()[0].clone()
    with pytest.warns(graftlet.errors.RoundingWarning):
        model.eval().merge_adapter()
    assert (model(x) - y).norm() < 0.2 * (y - wanted).norm()
    model.unmerge_adapter()
    assert torch.equal(site.read()[0], W)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_layout_for_some_cpus_reads_as_before(nested: bool) -> None:
    """bitsandbytes lays a 4-bit weight out anew as it is first called for inference on a CPU that has AVX512-BF16."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = four_bit("nf4", nested)(nn.Linear(IN, OUT))
    site = site_of(layer)
    assert site is not None
    W, saved = site.read()[0].clone(), site.save()
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert (site.shape, site.dtype) == ((OUT, IN), torch.float32)
    again = site.read()[0]
    assert (again - W).abs().max() <= 2**-8 * W.abs().max()  # its scales are in bfloat16 there
    site.write(W, None)
    assert (site.read()[0] - W).norm() <= 0.02 * W.norm()
    site.restore(saved)
    assert torch.equal(site.read()[0], W)
