# SPDX-License-Identifier: Apache-2.0
"""QA-LoRA beside the reference, which has it for GPTQ layers alone: what its forward adds, from the same tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graftlet
from graftlet.errors import ConfigError
from graftlet.testing.benches import layers, perturb

variants = pytest.importorskip("peft.tuners.lora.variants")

IN, OUT, R, GROUP = 24, 10, 4, 6


def adapted(**other: object) -> nn.Module:
    torch.manual_seed(0)
    config = graftlet.LoraConfig(
        r=R, lora_alpha=6, target_modules=["0"], use_qalora=True, qalora_group_size=GROUP, **other
    )
    model = graftlet.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config)
    perturb(model)
    return model


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)], ids=str)
def test_the_output_is_the_references(shape: tuple[int, ...]) -> None:
    model = adapted()
    (host,) = layers(model).values()
    layer = SimpleNamespace(
        lora_A=host.lora_A,
        lora_B=host.lora_B,
        lora_dropout={"default": nn.Identity()},
        scaling=host.scaling,
        qalora_group_size={"default": GROUP},
        in_features=IN,
        training=False,
    )
    x = torch.randn(shape)
    base = host.base_layer(x)
    meant = variants.QALoraLinearVariant.forward(layer, "default", x, base)
    assert torch.allclose(model(x), meant, atol=1e-5)


def test_the_shapes_are_the_references() -> None:
    reference = SimpleNamespace(
        in_features=IN, other_param_names=(), lora_A=nn.ModuleDict({"default": nn.Linear(IN, R, bias=False)})
    )
    config = SimpleNamespace(qalora_group_size=GROUP)
    variants.QALoraLinearVariant.init(reference, "default", config)
    (host,) = layers(adapted()).values()
    assert host.lora_A["default"].weight.shape == reference.lora_A["default"].weight.shape == (R, IN // GROUP)
    assert host.lora_B["default"].weight.shape == (OUT, R)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide the 24 inputs"):
        graftlet.get_peft_model(
            nn.Sequential(nn.Linear(IN, OUT)),
            graftlet.LoraConfig(target_modules=["0"], use_qalora=True, qalora_group_size=5),
        )
    with pytest.raises(ConfigError, match="at least 1"):
        graftlet.LoraConfig(use_qalora=True, qalora_group_size=0)
