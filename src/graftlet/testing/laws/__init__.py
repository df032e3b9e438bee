# SPDX-License-Identifier: Apache-2.0
"""The laws that every method keeps, on every kind of layer it works on.

A law is a function of a case that raises `AssertionError` with what was expected. `LAWS` says which cases each holds for.
"""

from __future__ import annotations

from collections.abc import Callable

from ...core.prompt import Prompt
from ..case import Case
from .acting import (
    a_new_adapter_changes_nothing,
    disabled_equals_the_base,
    forward_is_the_operation_with_the_transformed_weight,
    it_works_on_a_half_precision_base,
    it_works_under_autocast,
    merged_equals_forward_and_unmerging_restores_the_bits,
    merging_for_good_leaves_a_bare_model,
    only_declared_tensors_get_gradients,
    what_has_no_merged_form_says_so,
)
from .keeping import (
    copied_and_pickled_it_is_equal,
    it_compiles_for_training,
    it_compiles_without_a_graph_break,
    its_config_survives_json,
    its_tensors_move_to_another_model,
    made_on_meta_it_has_no_memory_until_loaded,
    saved_and_loaded_it_is_equal,
    the_same_seed_gives_the_same_bytes,
)
from .several import (
    a_deleted_adapter_leaves_the_others_and_the_base,
    a_mixed_batch_gives_each_row_its_adapter,
    an_adapter_may_have_any_name,
    two_active_adapters_follow_the_declared_law,
)


def always(case: Case) -> bool:
    return True


def mergeable(case: Case) -> bool:
    """A merged form exists."""
    return case.merges


def weighted(case: Case) -> bool:
    """The method has a function on the weight."""
    return not case.replaces and not case.whole


def beside(case: Case) -> bool:
    """The method acts on layers, or on blocks: not on what goes into the model."""
    return not issubclass(case.entry.method, Prompt)


def transforms(case: Case) -> bool:
    """That function says all that the method does."""
    return weighted(case) and mergeable(case)


Law = Callable[[Case], None]

LAWS: dict[Law, Callable[[Case], bool]] = {
    a_new_adapter_changes_nothing: lambda case: case.starts,
    only_declared_tensors_get_gradients: always,
    forward_is_the_operation_with_the_transformed_weight: transforms,
    merged_equals_forward_and_unmerging_restores_the_bits: mergeable,
    merging_for_good_leaves_a_bare_model: mergeable,
    what_has_no_merged_form_says_so: lambda case: not case.merges,
    disabled_equals_the_base: always,
    it_works_on_a_half_precision_base: always,
    it_works_under_autocast: always,
    two_active_adapters_follow_the_declared_law: transforms,
    a_mixed_batch_gives_each_row_its_adapter: always,
    an_adapter_may_have_any_name: always,
    a_deleted_adapter_leaves_the_others_and_the_base: lambda case: not case.rebased,  # such a start moves the base
    the_same_seed_gives_the_same_bytes: always,
    saved_and_loaded_it_is_equal: always,
    its_tensors_move_to_another_model: always,
    its_config_survives_json: always,
    copied_and_pickled_it_is_equal: always,
    made_on_meta_it_has_no_memory_until_loaded: beside,
    it_compiles_without_a_graph_break: lambda case: case.bench.name != "attention" and not case.whole,
    it_compiles_for_training: lambda case: not case.whole,
}
"""Every law, and which cases it holds for."""

ONCE: frozenset[Law] = frozenset({it_compiles_without_a_graph_break, it_compiles_for_training})
"""The slow ones, which say little more on another layer."""
