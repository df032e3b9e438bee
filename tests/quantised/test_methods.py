# SPDX-License-Identifier: Apache-2.0
"""The laws of methods on quantised layers: every method on every back end whose weights can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlet import PeftModel, merge_errors
from graftlet.core.method import Replace
from graftlet.registry import entries
from graftlet.testing import laws
from graftlet.testing.benches import Bench
from graftlet.testing.case import Case
from graftlet.testing.running import SINGLE, adapted, run, same
from graftlet.weights import site as sites

from ..laws.cases import REFUSED, case, settings_of
from .backends import BACKENDS, Backend
from .test_storage import bits

pytestmark = pytest.mark.filterwarnings(
    "ignore::graftlet.errors.StartWarning", "ignore::graftlet.errors.RoundingWarning", "ignore::DeprecationWarning"
)

IN, OUT = 32, 48
QUICK = {"LORA", "IA3", "HRA", "ROAD", "HIRA", "VERA", "OSF", "BOFT"}
"""One or two of each family."""


def bench(backend: Backend) -> Bench:
    return Bench(str(backend), sites.Linear, lambda: backend.make(nn.Linear(IN, OUT)), lambda: (torch.randn(4, 3, IN),))


def rows() -> list[tuple[Case, Backend]]:
    """Single precision alone: what half precision does to a sum is no matter of the back end."""
    return [
        (case(entry, setting, bench(backend)), backend)
        for backend in BACKENDS
        if not str(backend).endswith(("brain", "words"))
        for entry in entries()
        if sites.Linear in entry.sites and not issubclass(entry.method, Replace)
        for setting in settings_of(entry)
        if "linear" not in REFUSED.get((entry.name, setting), ())
    ]


def table(only: Callable[[Case], bool] = lambda _: True, copies: bool = False, exact: bool = False) -> Any:
    """copies: the layer must be able to be copied. exact: a call of it must be the product with what is read, to rounding;
    LLM.int8's rounds the inputs too, so it is another one as soon as a method, or a merge, computes with what is read.
    """
    found = [
        pytest.param(
            c, b, id=str(c), marks=() if c.entry.name in QUICK and c.first and str(b) == "nf4" else pytest.mark.slow
        )
        for c, b in rows()
        if only(c) and (b.copies or not copies) and (b.call < 1e-3 or not exact)
    ]
    return pytest.mark.parametrize(("case", "backend"), found)


@table(lambda c: c.starts and not c.rebased, exact=True)
def test_a_new_adapter_changes_nothing(case: Case, backend: Backend) -> None:
    laws.a_new_adapter_changes_nothing(case)


@table()
def test_only_declared_tensors_get_gradients(case: Case, backend: Backend) -> None:
    laws.only_declared_tensors_get_gradients(case)


@table(copies=True, exact=True)
def test_disabled_equals_the_base(case: Case, backend: Backend) -> None:
    laws.disabled_equals_the_base(case)


@table(lambda c: c.merges)
def test_merged_dequantised_it_is_as_it_was(case: Case, backend: Backend) -> None:
    model = adapted(case)
    y = run(model, case)
    bare = model.merge_and_unload(dequantize=True)
    assert all(type(p) is nn.Parameter for p in bare.parameters())
    tolerance = max(8 * torch.finfo(SINGLE).eps, 4 * backend.call) * float(y.abs().max().clamp_min(1))
    assert (run(bare, case) - y).abs().max() <= tolerance


@table(lambda c: c.merges)
def test_unmerging_restores_the_bits(case: Case, backend: Backend) -> None:
    model = adapted(case)
    site = model.base_model.model.l.site
    before, y = bits(site.module), run(model, case)
    model.merge_adapter()
    (error,) = merge_errors(model).values()
    assert error.weight <= backend.rounding * 1.5  # an adapted weight is not normally distributed
    model.unmerge_adapter()
    assert bits(site.module) == before
    same(run(model, case), y)


@table(lambda c: c.entry.method.unmixable is None)
def test_a_mixed_batch_gives_each_row_its_adapter(case: Case, backend: Backend) -> None:
    laws.a_mixed_batch_gives_each_row_its_adapter(case)


@table()
def test_saved_and_loaded_it_is_equal(case: Case, backend: Backend, tmp_path: Path) -> None:
    model = adapted(case)
    model.save_pretrained(tmp_path)
    same(run(PeftModel.from_pretrained(case.bench.model(), tmp_path).eval(), case), run(model, case))
