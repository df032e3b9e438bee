# SPDX-License-Identifier: Apache-2.0
"""Python's collector waits while an adapter is put in, and is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch import nn

from graftlet import LoraConfig, get_peft_model
from graftlet.errors import GraftletError
from graftlet.methods.lora import LoRA


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("on", [True, False])
def test_it_waits_and_is_as_it_was(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    init = LoRA.init
    monkeypatch.setattr(LoRA, "init", lambda self, p: seen.append(gc.isenabled()) or init(self, p))
    (gc.enable if on else gc.disable)()
    made = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert gc.isenabled() is on
    with pytest.raises(GraftletError):
        made.add_adapter("b", LoraConfig(target_modules=["nowhere"]))
    assert gc.isenabled() is on
    assert seen == [False]
