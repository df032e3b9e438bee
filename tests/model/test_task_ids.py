# SPDX-License-Identifier: Apache-2.0
"""What a call carries to the layers: Poly's tasks, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftlet
from graftlet import Call, using
from graftlet.errors import CallError
from graftlet.testing.benches import BENCHES, perturb

TASKS = torch.tensor([0, 1, 2, 1])


@pytest.fixture
def model() -> Any:
    config = graftlet.PolyConfig(target_modules=["l"], n_tasks=3, r=2)
    made = graftlet.get_peft_model(BENCHES["linear"].model(), config)
    made.add_adapter("other", graftlet.PolyConfig(target_modules=["l"], n_tasks=3, r=2))
    perturb(made, "default", by=0.5)
    perturb(made, "other", seed=3, by=0.5)
    return made.eval()


def test_each_row_has_its_task(model: Any) -> None:
    (x,) = BENCHES["linear"].example()
    y = model(x, task_ids=TASKS)
    for i, task in enumerate(TASKS):
        torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1], task_ids=task[None]))
    assert not torch.allclose(y, model(x, task_ids=TASKS.flip(0)), atol=1e-3)


def test_rows_of_several_adapters_keep_their_tasks(model: Any) -> None:
    (x,) = BENCHES["linear"].example()
    y = model(x, task_ids=TASKS, adapter_names=["other", "__base__", "default", "other"])
    own = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        own[name] = model(x, task_ids=TASKS)
    with model.disable_adapter():
        base = model(x)
    expected = torch.stack([own["other"][0], base[1], own["default"][2], own["other"][3]])
    torch.testing.assert_close(y, expected)


def test_a_bare_layer_reads_the_context(model: Any) -> None:
    (x,) = BENCHES["linear"].example()
    with using(Call(values={"task_ids": TASKS})):
        torch.testing.assert_close(model.base_model.model(x), model(x, task_ids=TASKS))


def test_a_bare_models_call_takes_them() -> None:
    (x,) = BENCHES["linear"].example()
    config = graftlet.PolyConfig(target_modules=["l"], n_tasks=3, r=2)
    bare = graftlet.inject_adapter_in_model(config, BENCHES["linear"].model())
    perturb(bare, "default", by=0.5)
    with using(Call(values={"task_ids": TASKS})):
        expected = bare.eval()(x)
    assert torch.equal(bare(x, task_ids=TASKS), expected)
    assert not torch.allclose(bare(x, task_ids=TASKS.flip(0)), expected, atol=1e-3)


@pytest.mark.parametrize("given", [None, TASKS[:3], TASKS + 1], ids=["none", "too few", "unknown task"])
def test_tasks_that_do_not_fit_are_refused(model: Any, given: Any) -> None:
    (x,) = BENCHES["linear"].example()
    with pytest.raises(CallError, match="task"):
        model(x, task_ids=given)
