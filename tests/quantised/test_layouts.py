# SPDX-License-Identifier: Apache-2.0
"""What cannot be run here, against stand-ins of its layout; what has no layer class of its own; and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.errors import MergeError, UnsupportedLayerError
from graftlet.testing.benches import layers, perturb
from graftlet.weights import storage
from graftlet.weights.site import Linear, site_of

from .formats import FORMATS, IN, OUT
from .standins import AutoGPTQ, Int8Kernel, NVFP4Kernel, PatchedLinear

transformers = pytest.importorskip("transformers")


def eetq(plain: nn.Linear, patch: pytest.MonkeyPatch) -> nn.Module:
    from transformers.integrations import eetq

    patch.setattr(eetq, "eetq_kernels_hub", Int8Kernel, raising=False)
    made = eetq.EetqLinear(IN, OUT, bias=True).requires_grad_(False)
    scales = plain.weight.detach().abs().amax(1) / 127
    made.weight.copy_((plain.weight.detach() / scales[:, None]).round().T)
    made.weight_scales.copy_(scales)
    made.bias.copy_(plain.bias.detach())
    return made


def nvfp4(plain: nn.Linear, patch: pytest.MonkeyPatch) -> nn.Module:
    from transformers.integrations import nvfp4

    patch.setattr(nvfp4, "load_nvfp4_kernel", lambda: NVFP4Kernel)
    made: Any = nvfp4.NVFP4Linear(IN, OUT)
    made.weight, made.weight_sf_rowmajor, made.weight_global_scale = NVFP4Kernel.pack(plain.weight.detach())
    return made


STANDINS = {
    "auto-gptq": (lambda plain, patch: AutoGPTQ(plain), 0.09),
    "inc": (lambda plain, patch: PatchedLinear(plain, False), 0.04),
    "inc-each": (lambda plain, patch: PatchedLinear(plain, True), 0.04),
    "eetq": (eetq, 0.01),
    "nvfp4": (nvfp4, 0.12),
}


@pytest.fixture(params=STANDINS)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Linear, nn.Module, float]:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    make, rounding = STANDINS[request.param]
    try:
        return plain, make(plain, monkeypatch), rounding
    except ImportError as error:
        pytest.skip(f"this transformers has no such layer: {error}")


def test_a_standin_is_read_as_it_computes(pair: tuple[nn.Linear, nn.Module, float]) -> None:
    plain, layer, rounding = pair
    site = site_of(layer)
    assert isinstance(site, Linear)
    assert site.shape == (OUT, IN)
    W, b = site.read()
    assert (W.shape, W.dtype) == ((OUT, IN), site.dtype)
    assert float((W.float() - plain.weight).norm() / plain.weight.norm()) <= rounding
    x = torch.randn(1, 5, IN).to(site.dtype)
    expected = nn.functional.linear(x.float(), W.float(), None if b is None else b.float())
    assert (layer(x) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_adapters_learn_on_a_standin_and_are_not_merged(pair: tuple[nn.Linear, nn.Module, float]) -> None:
    _, layer, _ = pair
    model = nn.Sequential(layer)
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["0"], use_dora=True))
    perturb(adapted)
    (host,) = layers(adapted).values()
    x = torch.randn(1, 5, IN).to(host.site.dtype)
    y = adapted(x)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(MergeError, match="cannot be written: .*dequantize=True"):
        adapted.merge_adapter()
    assert torch.equal(adapted(x), y)


@pytest.mark.parametrize("block", [None, (64, 64), (32, 128)], ids=str)
@pytest.mark.parametrize("form", ["float", "ue8m0"])
def test_blocks_of_8_bit_floats_are_read_as_transformers_reads_them(block: Any, form: str) -> None:
    from transformers.integrations import finegrained_fp8

    dequantised = getattr(finegrained_fp8, "_dequantize_fp8_weight", None)
    if dequantised is None:
        pytest.skip("this transformers has no function for it")
    torch.manual_seed(0)
    layer: Any = finegrained_fp8.FP8Linear(IN, OUT, block, scale_fmt=form).requires_grad_(False)
    site = site_of(layer)
    assert site is not None
    meant = torch.randn(OUT, IN) * torch.logspace(-3, 1, OUT)[:, None]
    site.write(meant, None)
    W = site.read()[0]
    assert torch.equal(W, dequantised(layer.weight, layer.weight_scale_inv, block, torch.float32))
    assert float((W - meant).norm() / meant.norm()) < 0.04
    if form == "ue8m0" and block is not None:
        assert layer.weight_scale_inv.dtype == torch.float8_e8m0fnu


def test_a_weight_of_zeros_is_kept() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(IN, OUT, (64, 64)).requires_grad_(False)
    site = site_of(layer)
    assert site is not None
    site.write(torch.zeros(OUT, IN), None)
    assert torch.equal(site.read()[0], torch.zeros(OUT, IN))


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.experts = experts


def mxfp4() -> nn.Module:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    return Mxfp4GptOssExperts(SimpleNamespace(num_local_experts=2, intermediate_size=32, hidden_size=32))


def loaded() -> nn.Module:
    """As loading leaves it: what the kernel takes is no parameter any more."""
    experts = mxfp4()
    del experts._parameters["gate_up_proj"]
    experts.gate_up_proj = object()
    return experts


@pytest.mark.parametrize("make", [mxfp4, loaded])
@pytest.mark.parametrize(
    "targets", [{"target_parameters": ["experts.gate_up_proj"], "target_modules": []}, {"target_modules": ["experts"]}]
)
def test_packed_experts_are_refused_and_their_neighbours_are_not(make: Any, targets: dict[str, Any]) -> None:
    model = Block(make())
    with pytest.raises(UnsupportedLayerError, match="kept as MXFP4.*dequantize=True"):
        graftlet.get_peft_model(model, graftlet.LoraConfig(r=2, **targets))
    assert list(layers(graftlet.get_peft_model(model, graftlet.LoraConfig(r=2, target_modules=["q_proj"]))))


@pytest.mark.parametrize("name", sorted(storage.BACKENDS))
def test_every_name_in_the_table_is_a_class_of_its_package(name: str) -> None:
    """A name that no class has would be as good as none."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    home, _, kind = name.rpartition(".")
    try:
        module = importlib.import_module(home)
    except Exception as error:  # a kernel that is built for GPUs alone, or a file of another version
        pytest.skip(f"{home} cannot be imported here: {type(error).__name__}")
    found = getattr(module, kind)
    assert storage.qualified(found) == name or home.startswith("torchao")


def test_every_back_end_of_the_table_can_be_loaded_or_lacks_its_package() -> None:
    for place in set(storage.BACKENDS.values()):
        home, _, attribute = place.partition(":")
        try:
            found = getattr(importlib.import_module(home), attribute)
        except ImportError:
            continue
        assert found.backend


def compressed(kind: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model that is packed, with its output before that."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**kind))
    config = QuantizationConfig(config_groups={"all": scheme})
    apply_quantization_config(model, config)
    limit = 448 if kind["type"] == "float" else 2 ** (kind["num_bits"] - 1) - 1
    for layer in (model[0], model[2]):
        scale: Any = layer.weight_scale
        groups = layer.weight.detach().unflatten(1, (scale.shape[1], -1))
        scale.data.copy_(groups.abs().amax(-1) / limit)
    x = torch.randn(3, 64)
    y = model(x).detach()
    ModelCompressor(quantization_config=config).compress_model(model)
    return model, x, y


KINDS = [
    {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    {"num_bits": 8, "type": "int", "strategy": "channel"},
    {"num_bits": 8, "type": "float", "strategy": "channel"},
]


@pytest.mark.parametrize("kind", KINDS, ids=["int4", "int8", "fp8"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compressed_tensors(kind: dict[str, Any]) -> None:
    model, x, y = compressed(kind)
    first: Any = model[0]
    site = site_of(first)
    assert site is not None
    assert (site.storage.backend, site.shape) == ("compressed-tensors", (48, 64))
    W = site.read()[0]
    adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(r=4, target_modules=["0", "2"]))
    with pytest.raises(MergeError, match="call the model once"):
        adapted.merge_adapter()
    assert torch.allclose(adapted(x), y, atol=1e-6)  # the call unpacks the layers inside the wrappers
    assert torch.equal(first.weight, W)
    perturb(adapted)
    adapted(x).square().mean().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    meant = adapted(x)
    adapted.merge_adapter()
    assert torch.allclose(adapted(x), meant, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(first.weight, W)


def test_each_format_is_tried_under_its_own_name() -> None:
    assert len({f.name for f in FORMATS}) == len(FORMATS)
