# SPDX-License-Identifier: Apache-2.0
"""Options of LoRA that do not go together: refused by name, when the config is made or before a model is touched."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from torch import nn

import graftlet
from graftlet import ArrowConfig, BdLoraConfig, KasaConfig, LoraConfig, MontecloraConfig, VeloraConfig
from graftlet.errors import ConfigError, PatternWarning
from tests.model.models import llama, lora

VARIANTS: dict[str, Any] = {
    "use_dora": True,
    "alora_invocation_tokens": [1, 2],
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "velora_config": VeloraConfig(),
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"]),
}


@pytest.mark.parametrize(("one", "other"), combinations(sorted(VARIANTS), 2))
def test_two_variants_are_refused(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"{one} and {other} do not go together") as error:
        LoraConfig(**{name: VARIANTS[name] for name in (one, other)})
    assert "LoraConfig" in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias"),
        ({"arrow_config": ArrowConfig(), "lora_bias": True}, "arrow_config and lora_bias"),
        ({"arrow_config": ArrowConfig(), "target_parameters": ["w"]}, "arrow_config and target_parameters"),
        ({"alora_invocation_tokens": []}, "at least one"),
        ({"alora_invocation_tokens": [1], "target_parameters": ["w"]}, "cannot go with target_parameters"),
        ({"alora_invocation_tokens": [1], "task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
        ({"kasa_config": KasaConfig(), "init_lora_weights": "pissa"}, "kasa_config does not go with .*'pissa'"),
        ({"kasa_config": KasaConfig(), "init_lora_weights": "corda"}, "kasa_config does not go with .*'corda'"),
        ({"use_bdlora": VARIANTS["use_bdlora"], "init_lora_weights": "eva"}, "use_bdlora does not go with .*'eva'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank; r=3"),
        ({"init_lora_weights": "orthogonal", "r": 4, "rank_pattern": {"q_proj": 5}}, "even rank; q_proj=5"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_bits"),
        ({"kasa_config": {"betta": 1.0}}, "kasa_config has no field 'betta', did you mean 'beta'"),
        ({"use_bdlora": {"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_proj"]}}, "overlap"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**options)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_overlap_are_told(name: str) -> None:
    with pytest.warns(PatternWarning, match=rf"{name} has '0\.self_attn\.q_proj' after 'q_proj'"):
        LoraConfig(**{name: {"q_proj": 4, "0.self_attn.q_proj": 2}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "corda"}, "starts from data.*run preprocess_corda"),
        ({"init_lora_weights": "lora_ga"}, "starts from data.*run preprocess_loraga"),
        ({"lora_bias": True}, "has no bias"),
        ({"init_lora_weights": "pissa", "r": 9}, "needs r <= 8"),
        ({"kasa_config": KasaConfig(), "r": 8}, "needs r < 8"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=3)}, "nblocks=3 must divide"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["v_proj"])}, "in neither list"),
        ({"target_parameters": ["mlp.up_proj.weight"], "lora_dropout": 0.1}, "lora_dropout=0.1 cannot work"),
        ({"target_parameters": ["mlp.up_proj.weight"], "lora_bias": True}, "bias"),
        ({"target_parameters": ["mlp.nothing"]}, "no parameter of the model"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_the_model_leave_it_alone(options: dict[str, Any], said: str) -> None:
    base = llama()
    before = [(n, type(m)) for n, m in base.named_modules()]
    bits = {k: t.clone() for k, t in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises((ConfigError, graftlet.NoMatchingPeftModuleError), match=said):
        graftlet.get_peft_model(base, lora(**options))
    assert [(n, type(m)) for n, m in base.named_modules()] == before
    assert all(t.equal(bits[k]) for k, t in base.state_dict().items())
    assert [p.requires_grad for p in base.parameters()] == flags
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
