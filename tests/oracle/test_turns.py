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
from graftlet.methods.data.turns import trace_of, turns
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
    with pytest.raises(ConfigError, match="was found for another model, other layers, other data or other options"):
        prepare(start, Runs(llama(), start), cache, r=3)
    other = llama()
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(ConfigError, match=r"found\.pt was found for another model"):
        prepare(start, Runs(other, start), cache)


class Killed(list):
    """Batches of which one is the last that is seen; `seen` counts them."""

    def __init__(self, batches: Any, last: int = -1) -> None:
        super().__init__(batches)
        self.last, self.seen = last, 0

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if self.seen == self.last:
                raise KeyboardInterrupt
            self.seen += 1
            yield batch


def eva(data: Any, cache: Path | None = None, model: Any = None, r: int = 2, **options: Any) -> dict[str, torch.Tensor]:
    own = lora.EvaConfig(**{k: options.pop(k) for k in ("tau", "use_label_mask") if k in options})
    config = graftlet.LoraConfig(r=r, target_modules=TARGETS, init_lora_weights="eva", eva_config=own)
    shown = options.pop("show_progress_bar", False)
    model = llama() if model is None else model
    return lora.get_eva_state_dict(model, data, config, show_progress_bar=shown, cache_file=cache, **options)


@pytest.mark.parametrize("room", [600, 4 * 2**30], ids=["a layer a turn", "all in one turn"])
def test_eva_goes_on_where_it_was(room: float, tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    whole, cache = Killed(LEARN), tmp_path / "eva.pt"
    found = eva(whole, room=room, show_progress_bar=lambda *facts: told.append(facts))
    assert told[-1][:2] == (6, 6)
    assert {calls for _, _, calls in told} == set(range(whole.seen + 1))
    with pytest.raises(KeyboardInterrupt):
        eva(Killed(LEARN, whole.seen - 1), cache, room=room)
    assert [p.name for p in tmp_path.iterdir()] == ["eva.pt.part"]
    told, resumed = [], Killed(LEARN)
    again = eva(resumed, cache, room=room, show_progress_bar=lambda *facts: told.append(facts))
    assert told[0][0] > 0
    assert resumed.seen <= whole.seen
    assert resumed.seen < whole.seen or room > 600
    assert [p.name for p in tmp_path.iterdir()] == ["eva.pt"]
    for key, tensor in found.items():
        assert torch.equal(again[key], tensor)
    unseen = Killed(LEARN, 0)
    assert eva(unseen, cache, room=room).keys() == found.keys()


def test_eva_in_turns_finds_what_it_finds_at_once() -> None:
    whole, parts = Killed(LEARN), Killed(LEARN)
    found, again = eva(whole), eva(parts, room=600)
    assert parts.seen > whole.seen
    for key, tensor in found.items():
        assert torch.equal(again[key], tensor)


def other() -> Any:
    model = llama()
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
    return model


@pytest.mark.parametrize(
    "changes",
    [{"model": other}, {"data": LEARN[1:]}, {"data": LEARN[::-1]}, {"r": 3}, {"tau": 0.5}, {"use_label_mask": False}],
    ids=["model", "less data", "other data", "rank", "tau", "mask"],
)
def test_what_eva_found_of_something_else_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    cache = tmp_path / "eva.pt"
    eva(LEARN, cache)
    given = {k: v() if k == "model" else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match="was found for another model, other layers, other data or other options"):
        eva(**{"data": LEARN, "cache": cache, **given})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "eva.pt"
    torch.save({"model.layers.0.self_attn.q_proj": torch.zeros(1)}, cache)
    with pytest.raises(ConfigError, match="was found for another"):
        eva(LEARN, cache)


def test_data_is_told_by_its_rows_and_not_by_their_order() -> None:
    rows = [{"x": torch.full((3,), float(i))} for i in range(5)]
    shuffled = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    assert trace_of(shuffled) == trace_of(rows)
    assert trace_of(rows) != trace_of(rows[:4])
    assert trace_of(rows) != trace_of([*rows[:4], {"x": torch.ones(3)}])
    assert trace_of(iter(rows)) is None
    assert trace_of(lambda: rows) is None
    assert trace_of({"x": rows}) is None

    class Anew(list):
        def __getitem__(self, i: Any) -> Any:
            return torch.rand(3)

    assert trace_of(Anew(rows)) == trace_of(Anew(rows))


def test_covariances_of_other_data_are_refused(tmp_path: Path) -> None:
    own = lora.CordaConfig(covariance_file=str(tmp_path / "c.pt"))
    config = graftlet.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda", corda_config=own)
    lora.preprocess_corda(llama(), config, LEARN)
    lora.preprocess_corda(llama(), config)  # the file says it all
    with pytest.raises(ConfigError, match=r"c\.pt was found for another model, other layers, other data"):
        lora.preprocess_corda(llama(), config, LEARN[::-1])


def test_groups_fit_into_the_room_and_an_iterator_is_seen_once() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
    assert turns(sizes, 6, True) == [["a", "b"], ["c"], ["d"]]
    assert turns(sizes, 6, False) == [["a", "b", "c", "d"]]
    model = llama()
    config = graftlet.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda")
    lora.preprocess_corda(model, config, iter(LEARN), room=1)
    assert graftlet.get_peft_model(model, config)
