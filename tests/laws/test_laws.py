# SPDX-License-Identifier: Apache-2.0
"""The laws that every registered method keeps, on every kind of layer it works on. Registering is enough to be tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from graftlet.testing import laws
from graftlet.testing.benches import BENCHES, Around, Bench
from graftlet.testing.case import Case
from graftlet.testing.laws import LAWS, always
from graftlet.testing.running import BRAIN, HALF
from graftlet.weights.site import Parameter, site_of

from .cases import cases

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")

NAMES = ["0", "weight", "keys", "lora_A", "ünïcode", "default", "forward", "training"]


def table(*, quick: Callable[[Case], bool] = always, only: Callable[[Case], bool] = always) -> Any:
    """The cases a law holds for; those that are not `quick` are marked slow."""
    rows = [pytest.param(c, id=str(c), marks=() if quick(c) else pytest.mark.slow) for c in cases() if only(c)]
    return pytest.mark.parametrize("case", rows)


def representative(case: Case) -> bool:
    """Plain settings on every common layer, and every setting on a linear one."""
    return (case.bench.common and case.first) or case.bench.name in ("linear", "decoder")


def linear(case: Case) -> bool:
    kind = "decoder" if case.whole else "embedding" if case.entry.name == "TRAINABLE_TOKENS" else "linear"
    return case.bench.name == kind and case.first


@pytest.mark.parametrize("bench", [pytest.param(b, id=b.name) for b in BENCHES.values()])
def test_a_site_tells_the_shape_of_what_it_reads(bench: Bench) -> None:
    layer = cast(Around, bench.model()).l
    names = [n.rpartition(".")[2] for n in bench.targets.get("target_parameters", ())]
    for site in [Parameter(layer, name) for name in names] or [site_of(layer)]:
        assert site is not None
        assert site.shape == site.read()[0].shape
        assert isinstance(site.shape, torch.Size)


@table(quick=representative)
def test_a_new_adapter_changes_nothing(case: Case) -> None:
    if not case.starts:
        pytest.skip("this start is not neutral")
    laws.a_new_adapter_changes_nothing(case)


@table(quick=representative)
def test_only_declared_tensors_get_gradients(case: Case) -> None:
    laws.only_declared_tensors_get_gradients(case)


@table(quick=representative, only=LAWS[laws.forward_is_the_operation_with_the_transformed_weight])
def test_forward_is_the_operation_with_the_transformed_weight(case: Case) -> None:
    laws.forward_is_the_operation_with_the_transformed_weight(case)


@table(quick=representative, only=LAWS[laws.merged_equals_forward_and_unmerging_restores_the_bits])
def test_merged_equals_forward_and_unmerging_restores_the_bits(case: Case) -> None:
    laws.merged_equals_forward_and_unmerging_restores_the_bits(case)


@table(quick=representative, only=LAWS[laws.merging_for_good_leaves_a_bare_model])
def test_merging_for_good_leaves_a_bare_model(case: Case) -> None:
    laws.merging_for_good_leaves_a_bare_model(case)


@table(only=LAWS[laws.what_has_no_merged_form_says_so])
def test_what_has_no_merged_form_says_so(case: Case) -> None:
    laws.what_has_no_merged_form_says_so(case)


@table(quick=representative)
def test_disabled_equals_the_base(case: Case) -> None:
    laws.disabled_equals_the_base(case)


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=["bfloat16", "float16"])
@table(quick=lambda c: linear(c) or (c.first and c.bench.name in ("embedding", "conv2")))
def test_adapters_on_a_half_precision_base(case: Case, dtype: torch.dtype) -> None:
    laws.it_works_on_a_half_precision_base(case, dtype)


@table(quick=representative)
def test_it_works_under_autocast(case: Case) -> None:
    laws.it_works_under_autocast(case)


@table(quick=representative, only=LAWS[laws.two_active_adapters_follow_the_declared_law])
def test_two_active_adapters_follow_the_declared_law(case: Case) -> None:
    laws.two_active_adapters_follow_the_declared_law(case)


@table(quick=representative)
def test_a_mixed_batch_gives_each_row_its_adapter(case: Case) -> None:
    laws.a_mixed_batch_gives_each_row_its_adapter(case)


@table(quick=linear)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_may_have_any_name(case: Case, name: str) -> None:
    laws.an_adapter_may_have_any_name(case, name)


@table(quick=linear, only=LAWS[laws.a_deleted_adapter_leaves_the_others_and_the_base])
def test_a_deleted_adapter_leaves_the_others_and_the_base(case: Case) -> None:
    laws.a_deleted_adapter_leaves_the_others_and_the_base(case)


@table(quick=representative)
def test_the_same_seed_gives_the_same_bytes(case: Case) -> None:
    laws.the_same_seed_gives_the_same_bytes(case)


@table(quick=representative)
def test_saved_and_loaded_it_is_equal(case: Case) -> None:
    laws.saved_and_loaded_it_is_equal(case)


@table(quick=representative)
def test_its_tensors_move_to_another_model(case: Case) -> None:
    laws.its_tensors_move_to_another_model(case)


@table(quick=linear)
def test_its_config_survives_json(case: Case) -> None:
    laws.its_config_survives_json(case)


@table(quick=representative)
def test_copied_and_pickled_it_is_equal(case: Case) -> None:
    laws.copied_and_pickled_it_is_equal(case)


@table(quick=representative, only=LAWS[laws.made_on_meta_it_has_no_memory_until_loaded])
def test_made_on_meta_it_has_no_memory_until_loaded(case: Case) -> None:
    laws.made_on_meta_it_has_no_memory_until_loaded(case)


@table(quick=linear, only=LAWS[laws.it_compiles_without_a_graph_break])
def test_it_compiles_without_a_graph_break(case: Case) -> None:
    laws.it_compiles_without_a_graph_break(case)


@pytest.mark.slow
@table(only=lambda c: linear(c) and LAWS[laws.it_compiles_for_training](c))
def test_it_compiles_for_training(case: Case) -> None:
    laws.it_compiles_for_training(case)
