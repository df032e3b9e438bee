# SPDX-License-Identifier: Apache-2.0
"""What a caller of `peft` sees is the same with the reference and with the drop-in."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .tools import ROOT, answer

pytest.importorskip("peft")

PROGRAM = "import json; from tests.dropin.behaviour import seen; print(json.dumps(seen()))"


@pytest.fixture(scope="module")
def told() -> tuple[dict[str, Any], dict[str, Any]]:
    return answer(PROGRAM, dropin=False), answer(PROGRAM, dropin=True)


@pytest.mark.parametrize("part", ["classes", "configs", "adapters", "status", "files", "functions"])
def test_callers_see_the_same(told: tuple[dict[str, Any], dict[str, Any]], part: str) -> None:
    assert told[1][part] == told[0][part]


STRICTER = {"bias": ["ValueError", "TypeError"]}
"""What is refused with another class: as the config is made, with all other values that cannot be."""


def test_errors_are_caught_as_the_references_are(told: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = told[0]["errors"], told[1]["errors"]
    assert ours.pop("classes") == theirs.pop("classes")
    for name, wanted in theirs.items():
        raised = STRICTER.get(name, wanted["raises"][:1])
        assert set(raised) <= set(ours[name]["raises"]), name
        assert ours[name]["warns"] == wanted["warns"], name
    assert ours.keys() == theirs.keys()


def test_the_guide_runs_with_the_drop_in() -> None:
    page = (ROOT / "docs" / "guides" / "drop-in.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    start = "import json, os, tempfile\nfrom tests.dropin.behaviour import base\nos.chdir(tempfile.mkdtemp())\n"
    code = "\n".join(
        [start + "base().save_pretrained('my-base')", *blocks, "print(json.dumps(get_peft_model.__module__))"]
    )
    assert answer(code, dropin=True) == "graftlet.model.mapping"
