# SPDX-License-Identifier: Apache-2.0
"""Each heuristic applies where it should, and not where it should not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftlet.knowledge import book
from graftlet.knowledge.advice import applying
from graftlet.knowledge.facts import Facts, of_recipe
from graftlet.knowledge.heuristics import Heuristic

QUIET = Facts(rate=1e-3, transformers="5.24.0", model={"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100})
LARGE = {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 128_256}
QUERY = {"target_modules": ["q_proj", "v_proj"]}
HEAD = {"target_modules": ["lm_head"]}
TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_local_experts": 8}
BERT = {"architectures": ["BertForSequenceClassification"]}
PISSA = {"init_lora_weights": "pissa_niter_4"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning-rate-of-lora": ({"rate": 1e-5}, {"rate": 2e-4}),
    "rslora-for-high-ranks": ({"config": {"r": 64}}, {"config": {"r": 64, "use_rslora": True}}),
    "target-all-linear": ({"config": {**QUERY, "r": 16}}, {"config": {"target_modules": "all-linear", "r": 16}}),
    "learning-rate-of-prompts": ({"method": "PROMPT_TUNING"}, {"method": "PROMPT_TUNING", "rate": 0.1}),
    "learning-rate-of-small-methods": ({"method": "VERA"}, {"method": "VERA", "rate": 0.03}),
    "two-rates-for-lora": ({"rate": 2e-4}, {"rate": 2e-4, "optimizer": "loraplus"}),
    "padding-as-end": ({"pad_is_end": True}, {}),
    "packing-without-isolation": ({"packing": True, "attention": "eager"}, {"packing": True}),
    "head-trained": ({"model": BERT}, {"model": BERT, "config": {"task_type": "SEQ_CLS"}}),
    "gradient-checkpointing": ({"model": LARGE}, {"model": LARGE, "checkpointing": True}),
    "checkpointing-and-frozen-inputs": ({"checkpointing": True, "reentrant": True}, {"checkpointing": True}),
    "accumulate-small-batches": ({"model": LARGE}, {"model": LARGE, "batch": 1}),
    "logits-of-a-large-vocabulary": ({"model": LARGE}, {"model": LARGE, "memory": 141 * 2**30}),
    "kernels-off": ({"kernels": False}, {"kernels": False, "method": "OFT"}),
    "dropout-and-kernels": (
        {"config": {"lora_dropout": 0.05}},
        {"config": {"lora_dropout": 0.05}, "device": "cuda", "liger": True},
    ),
    "fused-operations": ({"device": "cuda"}, {"device": "cuda", "liger": True}),
    "adapters-in-half-precision": (
        {"config": {"autocast_adapter_dtype": False}, "dtype": "bfloat16"},
        {"config": {"autocast_adapter_dtype": False}, "dtype": "float32"},
    ),
    "bfloat16-on-cpu": ({"dtype": "bfloat16", "half": False}, {"dtype": "bfloat16", "half": True}),
    "frozen-a-keeps-less": ({"model": LARGE}, {"model": LARGE, "optimizer": "lorafa"}),
    "merge-into-quantised": ({"quantised": "nf4", "merges": True}, {"merges": True}),
    "clone-of-quantised-output": ({"quantised": "nf4"}, {"quantised": "nf4", "trains": False}),
    "embeddings-saved": ({"resized": True}, {}),
    "tied-embeddings": (
        {"config": HEAD, "model": TIED},
        {"config": {**HEAD, "ensure_weight_tying": True}, "model": TIED},
    ),
    "fused-experts": (
        {"config": {"target_modules": ["w1", "w2"]}, "model": EXPERTS},
        {"config": {"target_modules": ["w1", "w2"]}, "model": EXPERTS, "transformers": "4.57.0"},
    ),
    "start-changes-base": ({"config": PISSA}, {"config": {"init_lora_weights": "gaussian"}}),
    "several-adapters-one-start": ({"config": PISSA, "serves": 2}, {"config": PISSA, "serves": 1}),
    "dora-in-mixed-batches": ({"config": {"use_dora": True}, "serves": 4}, {"config": {"use_dora": True}, "serves": 1}),
    "adapter-names-a-batch": ({"serves": 4}, {"serves": 1}),
    "safe-merge": ({"merges": True}, {}),
    "exact-merging-takes-time": ({"merges": True}, {"merges": True, "quantised": "int8"}),
    "merged-to-serve": ({"serves": 1}, {"serves": 2}),
    "linear-is-no-sum": ({"combines": "linear"}, {"combines": "exact"}),
    "hotswap-before-compile": ({"swaps": True, "compiles": True}, {"swaps": True}),
    "position-ids-with-prompts": ({"method": "PREFIX_TUNING"}, {}),
    "verify-the-base": ({"base_recorded": False}, {}),
    "older-adapter-files": ({"old_file": True}, {}),
}
"""By heuristic: changes of `QUIET` under which it applies, and under which it does not."""


def heuristic(name: str) -> Heuristic:
    page = book.find(name)
    assert isinstance(page, Heuristic)
    return page


def test_every_heuristic_has_cases() -> None:
    assert sorted(CASES) == sorted(page.name for page in book.of_kind("heuristic"))


@pytest.mark.parametrize("name", CASES)
def test_it_applies_and_does_not(name: str) -> None:
    yes, no = CASES[name]
    assert heuristic(name).applies(replace(QUIET, **yes))
    assert not heuristic(name).applies(replace(QUIET, **no))


def test_an_ordinary_run_is_told_nothing() -> None:
    assert applying(QUIET) == ()


def test_advice_is_one_line_with_its_code() -> None:
    (advice,) = applying(replace(QUIET, rate=1e-5))
    assert "\n" not in str(advice)
    assert str(advice).endswith("[learning-rate-of-lora]")


def test_facts_of_a_recipe() -> None:
    from graftlet.train.recipe import load_recipe

    root = Path(__file__).parents[2] / "examples" / "recipes"
    facts = of_recipe(
        load_recipe(root / "short-answers.toml", ["training.learning_rate=1e-5", "model.source=nobody/nothing"])
    )
    assert (facts.method, facts.rate, facts.trains) == ("LORA", 1e-5, True)
    assert "learning-rate-of-lora" in {advice.heuristic.name for advice in applying(facts)}
