# SPDX-License-Identifier: Apache-2.0
"""How adapters start on quantised layers: LoftQ, starts that take a part out of the base, and layers that refuse them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftlet
from graftlet.errors import MergeError, UnsupportedLayerError
from graftlet.testing.benches import layers
from graftlet.utils import replace_lora_weights_loftq

from ..train import tiny
from .backends import BACKENDS, Backend
from .test_layers import quantised
from .test_qlora import load, logits

FourBit: Any = pytest.importorskip(
    "graftlet.weights.bnb", reason="bitsandbytes is not here", exc_type=ImportError
).FourBit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def lora(**options: Any) -> graftlet.LoraConfig:
    return graftlet.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("alpha", [8, 32])
def test_loftq_on_a_4_bit_model_takes_over_what_was_lost(tmp_path: Path, alpha: int) -> None:
    folder = tiny.save(tmp_path / "base")
    whole: Any = tiny.model().eval()
    adapted = graftlet.get_peft_model(load(folder, "nf4"), lora(lora_alpha=alpha)).eval()
    before = {k: _lost(whole, k, h) for k, h in layers(adapted.get_base_model()).items()}
    off = (logits(adapted) - logits(whole)).norm()
    replace_lora_weights_loftq(adapted, folder)
    for key, host in layers(adapted.get_base_model()).items():
        singular = torch.linalg.svdvals(before[key])
        left = _lost(whole, key, host) - host.get_delta_weight("default")
        assert float(left.norm()) == pytest.approx(
            float(singular[8:].norm()), rel=1e-4
        )  # the nearest that rank 8 can come
    assert (logits(adapted) - logits(whole)).norm() < off


def _lost(whole: nn.Module, key: str, host: Any) -> torch.Tensor:
    return whole.get_submodule(key).weight.detach() - host.site.read()[0]


def test_loftq_keeps_what_does_good(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    adapted = graftlet.get_peft_model(load(folder, "nf4"), lora()).eval()
    replace_lora_weights_loftq(adapted, folder, callback=lambda model, key: "q_proj" in key)
    for key, host in layers(adapted.get_base_model()).items():
        assert bool(host.get_delta_weight("default").any()) == ("q_proj" in key)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b.name in ("nf4", "int8", "ao-int8", "quanto-int8")], ids=str
)
def test_a_start_that_takes_a_part_out_of_the_base(backend: Backend, start: Any) -> None:
    """What is left is rounded again, so that base and adapter together are off by one rounding and no more."""
    torch.manual_seed(1)
    x = torch.randn(5, 128)
    model = quantised(backend)
    y = model(x).detach()
    adapted = graftlet.get_peft_model(
        model, graftlet.LoraConfig(r=8, target_modules=["first", "second"], init_lora_weights=start)
    )
    assert (adapted(x) - y).norm() <= 2 * backend.rounding * y.norm()


def test_what_cannot_be_written_refuses_such_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(BACKENDS[0])
    x = torch.randn(5, 128)
    y = model(x)
    monkeypatch.setattr(FourBit, "unwritable", lambda *_: "it is set in stone")
    with pytest.raises(MergeError, match="a Linear4bit cannot be written: it is set in stone"):
        graftlet.get_peft_model(model, graftlet.LoraConfig(target_modules=["first"], init_lora_weights="pissa"))
    assert torch.equal(model(x), y)
    assert type(model.first).__name__ == "Linear4bit"


def test_what_cannot_be_read_takes_methods_that_never_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FourBit, "unreadable", lambda *_: "nobody has the key")
    for config in (
        graftlet.LoraConfig(r=4),
        graftlet.HRAConfig(r=4),
        graftlet.RoadConfig(group_size=16),
        graftlet.VeraConfig(r=4),
    ):
        config.target_modules = {"first", "second"}
        adapted = graftlet.get_peft_model(quantised(BACKENDS[0]), config)
        adapted(torch.randn(5, 128)).sum().backward()
        with pytest.raises((MergeError, UnsupportedLayerError), match="nobody has the key"):
            adapted.merge_adapter()
        with pytest.raises(UnsupportedLayerError, match="nobody has the key"):
            adapted.merge_and_unload(dequantize=True)
    for config in (
        graftlet.HiraConfig(r=4, target_modules=["first"]),
        graftlet.LoraConfig(r=4, target_modules=["first"], use_dora=True),
        graftlet.LoraConfig(r=4, target_modules=["first"], init_lora_weights="pissa"),
    ):
        model = quantised(BACKENDS[0])
        with pytest.raises(UnsupportedLayerError, match="cannot be read: nobody has the key"):
            graftlet.get_peft_model(model, config)
        assert type(model.first).__name__ == "Linear4bit"
