# SPDX-License-Identifier: Apache-2.0
"""Starts from data in bounded memory: layers in turns give what all at once give; a kill costs one turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftlet
import graftlet.tuners.lora as lora
from graftlet.errors import ConfigError
from graftlet.methods.data.turns import turns
from tests.model.models import llama
from tests.oracle.test_inits import LEARN, TARGETS

STARTS = pytest.mark.parametrize("start", ["corda", "lora_ga"])


class Runs:
    """Runs a model on the data, and fails in one of its runs."""

    def __init__(self, model: Any, start: str, fails: int = 0) -> None:
        self.model, self.start, self.fails, self.count = model, start, fails, 0
        self.found: Any = None

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.fails:
            raise KeyboardInterrupt
        for batch in LEARN:
            loss = self.model(**batch).loss
            if self.start == "lora_ga":
                loss.backward()


def prepare(start: str, run: Runs, cache: Path | None, mode: str = "ipm", r: int = 2, **options: Any) -> None:
    own = lora.CordaConfig(corda_method=mode, cache_file=None if cache is None else str(cache))  # type: ignore[arg-type]
    config = graftlet.LoraConfig(r=r, target_modules=TARGETS, init_lora_weights=start, corda_config=own)
    torch.manual_seed(0)
    if start == "corda":
        lora.preprocess_corda(run.model, config, run, **options)
    else:
        lora.preprocess_loraga(run.model, config, run, None if cache is None else str(cache), **options)
    run.found = graftlet.get_peft_model(run.model, config)


def state(run: Runs) -> dict[str, torch.Tensor]:
    """The products and the base's weights: what does not depend on the signs of directions."""
    held = run.found.state_dict()
    made = {k: held[k.replace("lora_A", "lora_B")] @ t for k, t in held.items() if ".lora_A." in k}
    return {**made, **{k: t for k, t in held.items() if ".lora_" not in k}}


def same(one: Runs, other: Runs) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, atol=2e-5, rtol=1e-3, msg=key)


@STARTS
def test_layers_in_turns_give_what_all_at_once_give(start: str) -> None:
    whole, parts = Runs(llama(), start), Runs(llama(), start)
    prepare(start, whole, None)
    prepare(start, parts, None, room=600)
    assert whole.count == 1
    assert parts.count > 2
    same(whole, parts)


@STARTS
def test_what_was_killed_goes_on_where_it_was(start: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole, cache = Runs(llama(), start), tmp_path / "found.pt"
    prepare(start, whole, None, room=600)
    killed = Runs(llama(), start, fails=3)
    with pytest.raises(KeyboardInterrupt):
        prepare(start, killed, cache, room=600)
    assert [p.name for p in tmp_path.iterdir()] == ["found.pt.part"]
    resumed = Runs(llama(), start)
    prepare(start, resumed, cache, room=600, show_progress_bar=True)
    assert resumed.count == whole.count - 2  # two turns were done before the kill
    assert "6/6" in capsys.readouterr().err
    same(whole, resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["found.pt"]
    again = Runs(llama(), start)
    prepare(start, again, cache)
    assert again.count == 0
    same(whole, again)


@STARTS
def test_what_was_found_of_something_else_is_refused(start: str, tmp_path: Path) -> None:
    cache = tmp_path / "found.pt"
    prepare(start, Runs(llama(), start), cache)
    with pytest.raises(ConfigError, match="was found for another model, other layers or other options"):
        prepare(start, Runs(llama(), start), cache, r=3)
    other = llama()
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(ConfigError, match=r"found\.pt was found for another model"):
        prepare(start, Runs(other, start), cache)


def test_groups_fit_into_the_room_and_an_iterator_is_seen_once() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
    assert turns(sizes, 6, True) == [["a", "b"], ["c"], ["d"]]
    assert turns(sizes, 6, False) == [["a", "b", "c", "d"]]
    model = llama()
    config = graftlet.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda")
    lora.preprocess_corda(model, config, iter(LEARN), room=1)
    assert graftlet.get_peft_model(model, config)
