# SPDX-License-Identifier: Apache-2.0
"""Many threads on one model: changes wait for calls, calls for changes, and every output is that of a single run."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlet
from graftlet.core.traffic import Traffic
from graftlet.errors import BusyError, GraftletError
from tests.hostile.tools import saved
from tests.model.models import IDS, adapted, llama, logits, lora, silent


def all_of(*works: Callable[[], None], seconds: float = 60) -> None:
    """Run works at once, each in a thread; raises what one of them raised."""
    errors: list[BaseException] = []

    def caught(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(w,), daemon=True) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


def test_calls_beside_changes_are_those_of_single_runs(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = adapted(llama(), lora(init_lora_weights=False))
    model.add_adapter("b", lora(init_lora_weights=False))
    plain = logits(llama())
    wanted = {name: _of(model, name) for name in ("default", "b")}
    wanted["__base__"] = plain
    ended = time.monotonic() + 4

    def call(name: str) -> Callable[[], None]:
        def work() -> None:
            while time.monotonic() < ended:
                assert torch.allclose(_of(model, name), wanted[name], atol=1e-5), name

        return work

    def change() -> None:
        with silent():
            while time.monotonic() < ended:
                model.load_adapter(folder, "c")
                model.rename_adapter("c", "d")
                model.set_adapter("b")
                model.merge_adapter(["b"])
                model.unmerge_adapter()
                model.set_adapter("default")
                model.delete_adapter("d")

    all_of(call("default"), call("b"), call("__base__"), change)
    assert list(model.peft_config) == ["default", "b"]
    assert torch.equal(logits(model), wanted["default"])


def _of(model: Any, name: str) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return logits(model)
    with model.using(name):
        return logits(model)


def test_loads_at_once_all_arrive(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = adapted(llama(), lora())
    names = [f"n{i}" for i in range(8)]
    all_of(*(lambda name=name: model.load_adapter(folder, name) for name in names))
    assert set(model.peft_config) == {"default", *names}
    outputs = [_of(model, name) for name in names]
    assert all(torch.equal(o, outputs[0]) for o in outputs)


def test_one_name_at_once_is_taken_once(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = adapted(llama(), lora())
    refused: list[str] = []

    def work() -> None:
        try:
            model.load_adapter(folder, "one")
        except GraftletError as error:
            refused.append(str(error))

    all_of(*[work] * 4)
    assert len(refused) == 3
    assert list(model.peft_config) == ["default", "one"]


def test_a_change_waits_for_the_calls_and_new_calls_for_it() -> None:
    traffic, order = Traffic(), list[str]()
    inside, waiting = threading.Event(), threading.Event()

    def call() -> None:
        with traffic.call():
            inside.set()
            waiting.wait(5)
            time.sleep(0.2)
            with traffic.call():  # inside its own call a thread goes on
                order.append("call")

    def change() -> None:
        inside.wait(5)
        waiting.set()
        with traffic.change(), traffic.change(), traffic.call():
            order.append("change")

    def late() -> None:
        waiting.wait(5)
        time.sleep(0.1)
        with traffic.call():
            order.append("late")

    all_of(call, change, late)
    assert order == ["call", "change", "late"]


def test_a_change_inside_a_call_beside_others_is_refused_rather_than_waiting_for_ever() -> None:
    traffic = Traffic()
    other, done = threading.Event(), threading.Event()

    def call() -> None:
        with traffic.call():
            other.set()
            done.wait(5)

    def both() -> None:
        other.wait(5)
        try:
            with traffic.call(), pytest.raises(BusyError, match="after the call"), traffic.change():
                raise AssertionError
        finally:
            done.set()

    all_of(call, both)
    with traffic.call(), traffic.change():  # alone it may
        pass


def test_a_change_of_a_bare_model_waits_for_its_calls() -> None:
    model: Any = graftlet.inject_adapter_in_model(lora(), llama())
    inside, order = threading.Event(), list[str]()

    def slowly(*_: Any) -> None:
        inside.set()
        time.sleep(0.3)
        order.append("call")

    model.model.layers[1].register_forward_hook(slowly)

    def call() -> None:
        model(IDS)

    def change() -> None:
        inside.wait(5)
        graftlet.inject_adapter_in_model(lora(), model, "other")
        order.append("change")

    all_of(call, change)
    assert order == ["call", "change"]
    with pytest.raises(IndexError):
        model(IDS + 10**6)
    graftlet.inject_adapter_in_model(lora(), model, "third")  # a call that failed is over


def test_copies_begin_without_traffic() -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    with model.traffic.call():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.traffic is not model.traffic
            with twin.traffic.change():
                pass
            assert torch.equal(logits(twin, input_ids=IDS), logits(model))
