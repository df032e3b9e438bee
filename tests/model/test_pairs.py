# SPDX-License-Identifier: Apache-2.0
"""Options of LoRA that do not go together: refused by name, when the config is made or before a model is touched."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import graftlet
from graftlet import ArrowConfig, BdLoraConfig, KasaConfig, LoraConfig, MontecloraConfig, VeloraConfig
from graftlet.errors import ConfigError, PatternWarning
from tests.model.models import adapted, llama, load, logits, lora, move, save

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


PATTERNS = pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
TWO = ["q_proj", "v_proj"]
HIDDEN = {"q_proj": 4, "self_attn.q_proj": 2}
OVERLAPPING = [
    {r"0\..*_proj": 4, r".*\.q_proj": 2},  # they share a layer, and each has others
    {r".*\.q_proj": 4, r"0\..*q_proj": 2},  # the second is left nothing
    {"q_proj": 4, r".*q_proj": 2},
]
EXCEPTIONS = [
    {"0.self_attn.q_proj": 2, "q_proj": 4},
    {r"0\..*": 2, r"[01]\..*": 4},
    {"q_proj": 4, "0.self_attn.q_proj": 4},
    {r"0\..*_proj": 4, r".*\.q_proj": 4},
]


@PATTERNS
def test_a_pattern_that_an_earlier_one_hides_is_refused_when_the_config_is_made(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"LoraConfig\.{name} has 'self_attn\.q_proj' after 'q_proj'"):
        LoraConfig(**{name: HIDDEN})
    with pytest.raises(ConfigError, match=r"LoHaConfig\.rank_pattern has"):
        graftlet.LoHaConfig(rank_pattern=HIDDEN)


@PATTERNS
@pytest.mark.parametrize("patterns", OVERLAPPING, ids=str)
def test_patterns_that_overlap_are_refused_before_the_model_is_touched(name: str, patterns: dict[str, int]) -> None:
    model = llama()
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ConfigError, match=rf"{name} has .* and .*, which give .*q_proj' different values"):
        graftlet.get_peft_model(model, lora(target_modules=TWO, **{name: patterns}))
    assert [(n, type(m)) for n, m in model.named_modules()] == before


@PATTERNS
@pytest.mark.parametrize("patterns", EXCEPTIONS, ids=str)
@pytest.mark.filterwarnings("error")
def test_an_exception_before_its_rule_is_none_of_these(name: str, patterns: dict[str, int]) -> None:
    graftlet.get_peft_model(llama(), lora(target_modules=TWO, **{name: patterns}))


@pytest.mark.parametrize("patterns", [HIDDEN, *OVERLAPPING], ids=str)
def test_a_file_with_patterns_that_overlap_loads_by_the_first(patterns: dict[str, int], tmp_path: Path) -> None:
    patterns = dict(sorted(patterns.items()))  # as the reference writes them
    config: Any = lora(peft, r=3, target_modules=TWO, rank_pattern=patterns, alpha_pattern=patterns)
    theirs = adapted(llama(), config, peft)
    move(theirs)
    save(theirs, tmp_path / "theirs")
    with pytest.warns(PatternWarning, match="(rank|alpha)_pattern has "):
        ours: Any = graftlet.PeftModel.from_pretrained(llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours), logits(theirs))
    save(ours, tmp_path / "again")
    with pytest.warns(PatternWarning, match="(rank|alpha)_pattern has "):
        again: Any = graftlet.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(ours))
    with pytest.warns(PatternWarning, match="pattern has "):
        again.add_adapter("copy", copy.deepcopy(ours.peft_config["default"]))


def test_the_order_of_patterns_is_kept_in_the_file(tmp_path: Path) -> None:
    patterns = {"self_attn.q_proj": 4, "1.self_attn.k_proj": 2, "k_proj": 3}
    model = adapted(llama(), lora(target_modules=["q_proj", "k_proj"], rank_pattern=patterns))
    move(model)
    save(model, tmp_path)
    again = load(llama(), tmp_path)
    assert list(again.peft_config["default"].rank_pattern) == list(patterns)
    assert torch.equal(logits(again), logits(model))


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
