# SPDX-License-Identifier: Apache-2.0
"""A reward model: the loss is the paper's, better answers come to be ranked higher, and scores are there again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graftlet.cli._generate import Settings, generate
from graftlet.errors import CallError, ConfigError
from graftlet.train.prepare import prepare_data
from graftlet.train.recipe import check, load_recipe
from graftlet.train.reward import RewardCollator, RewardTrainer
from graftlet.train.run import Result, train
from graftlet.train.trainer import training_arguments
from graftlet.train.use import scores

from . import tiny
from .test_run import cut_and_resumed

QUIET = Console(quiet=True)
RECIPES = Path(__file__).parents[2] / "examples/recipes"


def recipe(base: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Answers that say now are better, which the base thinks the worse ones."""
    rows = [{"text": str(i), "good": f"{i} now", "bad": f"{i} please"} for i in range(30)]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    tables: dict[str, Any] = {
        "task": "reward",
        **tiny.opening(base, tmp_path / "out"),
        "data": {
            "source": str(data),
            "prompt": "{text}?",
            "completion": "{good}",
            "rejected": "{bad}",
            "validation": 4,
            "test": 8,
        },
        "training": {"batch_size": 4, "learning_rate": 1e-2, "max_steps": 10, "log_every": 1},
        "evaluation": {"samples": 2},
    }
    return {**tables, **{k: {**tables[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def run(base: Path, tmp_path: Path, *callbacks: Any, **changes: Any) -> Result:
    return train(check(recipe(base, tmp_path, **changes)), callbacks, QUIET)


@pytest.fixture(scope="module")
def learnt(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(base, tmp_path_factory.mktemp("pairs"), evaluation={"verify": True})


def test_better_answers_come_to_be_ranked_higher(learnt: Result) -> None:
    before, after, loaded, merged = learnt.summary["measured"]
    assert after["validation_loss"] < 0.4 < 0.6 < before["validation_loss"]
    assert before["metric"] < after["metric"] == 1.0
    assert (after["right"], after["of"], learnt.summary["metric"]) == (8, 8, "ranked")
    assert loaded == {**after, "stage": loaded["stage"], "same_answers": 8}
    assert merged["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-3)
    page = learnt.report.read_text()
    assert "pairs ranked right, held-out" in page
    assert "loss a pair" not in page  # it stands in the picture
    assert learnt.summary["unit"] == "pair"


def test_scores_are_there_again(learnt: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTLET_STRICT", "1")
    model: Any = learnt.load()
    assert model.get_base_model().config.num_labels == 1
    better, worse = (scores(learnt.output, [("40", f"40 {end}"), ("7", f"7 {end}")]) for end in ("now", "please"))
    assert all(b > w for b, w in zip(better, worse, strict=True))
    assert scores(learnt.output, [("40", "40 now")]) == pytest.approx(better[:1], abs=1e-4)
    assert scores(learnt.output, []) == []


def test_the_loss_is_the_papers(base: Path, tmp_path: Path, learnt: Result) -> None:
    made = check(recipe(base, tmp_path))
    data = prepare_data(made, tiny.tokenizer())
    features = [data.train[i] for i in range(3)]
    model: Any = learnt.load().eval()
    trainer = RewardTrainer(model=model, args=training_arguments(made, torch.device("cpu"), 1))
    loss = float(trainer.compute_loss(model, RewardCollator(256)(features)).detach())

    def score(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, 0]

    margins = [score(f["input_ids"]) - score(f["rejected_input_ids"]) for f in features]
    assert loss == pytest.approx(sum(float(torch.log1p(torch.exp(-m))) for m in margins) / 3, rel=1e-3)


def test_resuming_ends_where_the_whole_run_does(base: Path, tmp_path: Path) -> None:
    cut_and_resumed(partial(run, base, tmp_path), tmp_path, 3, {"save_every": 2, "max_steps": 6})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"rejected": None}}, "data.rejected: task = 'reward' needs data.rejected"),
        ({"training": {"packing": True}}, "training.packing: this key is for task = 'sft', not for 'reward'"),
        ({"preference": None, "evaluation": {"metric": "exact_match"}}, "evaluation.metric: this key is for"),
        ({"data": {"label": "good"}}, "data.label: this key is for task = 'classification', not for 'reward'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(recipe(base, tmp_path, **changes))
    assert said in str(caught.value)


def test_the_same_answer_twice_is_no_pair(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the rejected answer is the preferred one"):
        run(base, tmp_path, data={"rejected": "{good}"})


def test_generate_says_what_to_use_in_its_place(learnt: Result) -> None:
    with pytest.raises(CallError, match=r"writes no text; in Python, graftlet.train.scores"):
        generate(str(learnt.output), ["a"], Settings(4, 0.0, 0, True, None, False))


def test_the_shipped_recipe_is_right() -> None:
    assert load_recipe(RECIPES / "plain-reward.toml").task == "reward"
