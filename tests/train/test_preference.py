# SPDX-License-Identifier: Apache-2.0
"""DPO: the loss is the paper's, the reference is the base, and a recipe of pairs runs."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import graftlet
from graftlet.errors import ConfigError
from graftlet.train.preference import PairCollator, PreferenceTrainer
from graftlet.train.recipe import check, load_recipe
from graftlet.train.run import train
from graftlet.train.trainer import training_arguments

from . import tiny

NAMES = ("input_ids", "labels", "rejected_input_ids", "rejected_labels")
RECIPES = Path(__file__).parents[2] / "examples/recipes"


def pairs(base: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Short answers are better than long ones."""
    rows = [{"text": str(i), "good": "yes", "bad": "no, never"} for i in range(20)]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    tables = {
        "task": "dpo",
        "data": {
            "prompt": "{text}?", "completion": "{good}", "rejected": "{bad}", "validation": 4, "test": 0, "balance": None,
        },
        "evaluation": {"metric": "none", "choices": []},
        **changes,
    }  # fmt: skip
    return tiny.recipe(base, data, tmp_path / "out", **tables)


def by_hand(policy: Any, reference: Any, feature: dict[str, list[int]], beta: float) -> float:
    """The loss of one pair, answer by answer, token by token."""

    def told(model: Any, kind: str) -> float:
        ids, labels = feature[f"{kind}input_ids"], feature[f"{kind}labels"]
        with torch.no_grad():
            odds = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(odds[i - 1, t]) for i, t in enumerate(labels) if t >= 0)

    margin = (told(policy, "") - told(reference, "")) - (told(policy, "rejected_") - told(reference, "rejected_"))
    return float(-torch.nn.functional.logsigmoid(torch.tensor(beta * margin)))


def test_the_loss_is_the_papers_with_the_base_as_reference(base: Path, tmp_path: Path) -> None:
    reference = tiny.model().eval()
    config = graftlet.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = graftlet.get_peft_model(copy.deepcopy(reference), config).eval()
    features = [
        dict(zip(NAMES, rows, strict=True))
        for rows in (
            ([1, 2, 3, 4], [-100, -100, 3, 4], [1, 2, 9], [-100, -100, 9]),
            ([5, 6, 7], [-100, 6, 7], [5, 8, 9, 7], [-100, 8, 9, 7]),
        )
    ]
    args = training_arguments(check(pairs(base, tmp_path)), torch.device("cpu"), 1)
    trainer = PreferenceTrainer(model=model, args=args, beta=0.3)
    loss = trainer.compute_loss(model, PairCollator(0)(features))
    expected = sum(by_hand(model, reference, f, 0.3) for f in features) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(0.6931, abs=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_recipe_of_pairs_learns_what_is_preferred(base: Path, tmp_path: Path) -> None:
    result = train(check(pairs(base, tmp_path)), console=Console(file=io.StringIO()))
    before, after = result.summary["measured"]
    assert before["validation_loss"] == pytest.approx(0.6931, abs=1e-3)  # the base is its own reference
    assert after["validation_loss"] < 0.65
    assert {"adapter_model.safetensors", "report.html"} <= {p.name for p in result.output.iterdir()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"prompt": "{text}", "completion": "{good}"}}, "needs data.rejected"),
        ({"training": {"packing": True}}, "training.packing: this key is for task = 'sft', not for 'dpo'"),
        ({"task": "sft"}, "for task = 'dpo'"),
        ({"task": "ppo"}, "task"),
    ],
)
def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(pairs(base, tmp_path, **changes))


def test_the_same_answer_twice_is_no_preference(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the rejected answer is the preferred one"):
        train(
            check(pairs(base, tmp_path, data={"completion": "{good}", "rejected": "{good}", "balance": None})),
            console=Console(quiet=True),
        )


def test_the_shipped_recipe_is_right() -> None:
    assert load_recipe(RECIPES / "plain-answers.toml").task == "dpo"
