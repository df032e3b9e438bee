# SPDX-License-Identifier: Apache-2.0
"""Files go both ways: what either one saves, the other loads with equal outputs, for every method and setting."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlet import PeftModel
from graftlet.testing.benches import near
from tests.laws.cases import Case, cases

from .reference import adapt, move, output, peft
from .test_layers import ANY, FORWARD

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")

BENCHES = ("no-bias", "linear", "conv2", "embedding", "experts")
MISSED = {"GLORA": (".zeros",), "RANDLORA": (".randlora_A.", ".randlora_B.")}
"""What the reference misses in a file and does not need: zeros, and copies of what stands in the file once."""


def rows() -> Any:
    """The cases on one layer of each kind; all but the plain settings are slow."""
    shared = [c for c in cases() if c.setting != "qalora"]  # the reference has it for layers of GPTQ alone
    found = [c for c in shared if c.bench.name in BENCHES and (c.first or c.bench.name == "linear")]
    found = [c for c in found if not any((c.entry.name, s, c.bench.name) in FORWARD for s in (ANY, c.setting))]
    quick = [() if c.bench.name in ("linear", "embedding") else pytest.mark.slow for c in found]
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=str(c), marks=m) for c, m in zip(found, quick, strict=True)]
    )


@rows()
def test_the_reference_loads_what_graftlet_saves(case: Case, tmp_path: Path) -> None:
    ours = adapt(case).ours
    move(ours)
    ours.save_pretrained(str(tmp_path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # a missing key is but a warning there
        theirs = peft.PeftModel.from_pretrained(case.bench.model(), str(tmp_path)).eval()
    missing = [
        k for w in told if "missing adapter keys" in str(w.message) for k in re.findall("'([^']*)'", str(w.message))
    ]
    assert not [k for k in missing if not any(part in k for part in MISSED.get(case.entry.name, ()))]
    inputs = case.bench.example()
    near(output(theirs, inputs, case), output(ours, inputs, case), torch.float32, steps=16)


@rows()
def test_graftlet_loads_what_the_reference_saves(case: Case, tmp_path: Path) -> None:
    theirs = adapt(case).theirs
    theirs.save_pretrained(str(tmp_path))
    ours = PeftModel.from_pretrained(case.bench.model(), tmp_path).eval()
    inputs = case.bench.example()
    near(output(ours, inputs, case), output(theirs, inputs, case), torch.float32, steps=16)
