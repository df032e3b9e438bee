# SPDX-License-Identifier: Apache-2.0
"""How a method acts: at its start, in training, forward, merged and disabled, and on a half-precision base."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import ConfigError, MergeError
from ..benches import learning, near, prompt_of, seeded, snapshot
from ..case import Case
from ..running import (
    BRAIN,
    SINGLE,
    adapted,
    base_output,
    by_weight,
    expect,
    fresh,
    loss,
    merged_weights,
    output,
    refuses,
    run,
    same,
    second,
    stripped,
    unchanged,
)


def a_new_adapter_changes_nothing(case: Case) -> None:
    near(run(fresh(case), case), base_output(case), SINGLE, what="a new adapter changes nothing")


def only_declared_tensors_get_gradients(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    model.train()
    with seeded(6):
        loss(model, case).backward()
    taught = {id(p) for p in learning(model, "default")}
    expect(taught, "an adapter that trains something")
    for name, parameter in model.named_parameters():
        learns, grad = id(parameter) in taught, parameter.grad
        expect(parameter.requires_grad == learns, f"{name} {'requires' if learns else 'requires no'} gradient")
        learns = learns and not any(part in name for part in case.idle)
        expect((grad is not None) == learns, f"{'a' if learns else 'no'} gradient for {name}")
        expect(grad is None or grad.isfinite().all(), f"a finite gradient for {name}")
        expect(grad is None or grad.any(), f"a gradient for {name} that is not all zero")


# forward and merging


def forward_is_the_operation_with_the_transformed_weight(case: Case) -> None:
    model = adapted(case)
    y = run(model, case)
    near(y, by_weight(model, case, merged_weights(model)), SINGLE, what="forward(x) is op(x, transform(W))")
    expect(not torch.allclose(y, base_output(case), atol=1e-3), "a trained adapter that does something")


def merged_equals_forward_and_unmerging_restores_the_bits(case: Case) -> None:
    model = adapted(case)
    before, y = snapshot(model), run(model, case)
    model.merge_adapter()
    near(run(model, case), y, SINGLE, what="the merged model's output is the unmerged one's")
    model.unmerge_adapter()
    unchanged(before, snapshot(model), "after unmerging")
    same(run(model, case), y, "the same output after unmerging")


def merging_for_good_leaves_a_bare_model(case: Case) -> None:
    model = adapted(case)
    y = run(model, case)
    bare = model.merge_and_unload()
    expect(bare.state_dict().keys() == case.bench.model().state_dict().keys(), "the base's own keys after merging")
    near(run(bare, case), y, SINGLE, what="the merged and unloaded model's output is the adapted one's")


def what_has_no_merged_form_says_so(case: Case) -> None:
    model = adapted(case)
    before = snapshot(model)
    refuses(ConfigError if prompt_of(model) else MergeError, model.merge_adapter, "merging is refused")
    unchanged(before, snapshot(model), "after a refused merge")


def disabled_equals_the_base(case: Case) -> None:
    model = adapted(case)
    base = run(stripped(model, case), replace(case, call={}))
    if not case.rebased:
        same(base, base_output(case), "unloading gives the base model back")
    y = run(model, case)
    with model.disable_adapter():
        same(run(model, case), base, "a disabled adapter does nothing")
    same(run(model, case), y, "an adapter that is enabled again acts as before")
    if case.merges:
        model.merge_adapter()
        with model.disable_adapter():
            near(run(model, case), base, SINGLE, what="a merged adapter that is disabled does nothing")


def it_works_under_autocast(case: Case, dtype: torch.dtype = BRAIN) -> None:
    """The output is the one without, as far as half precision goes; gradients are in the adapter's own precision."""
    model = adapted(case)
    y = run(model, case)
    with torch.autocast("cpu", dtype):
        found = output(model, case)
        total = loss(model, case)
    near(found.detach().float(), y, dtype, what=f"the output without autocast to {dtype}, as far as it can be told")
    total.backward()
    given = [(p.grad, p.dtype) for p in learning(model, "default") if p.grad is not None]
    expect(given, "gradients")
    expect(
        all(grad.dtype == kind and grad.isfinite().all() for grad, kind in given),
        "each finite, in its parameter's dtype",
    )


def it_works_on_a_half_precision_base(case: Case, dtype: torch.dtype = BRAIN) -> None:
    """The adapter is kept in single precision; outputs have the base's dtype and its precision."""
    model = adapted(case, dtype)
    y = run(model, case, dtype)
    expect(y.dtype == base_output(case, dtype).dtype, f"an output of the base's dtype, not {y.dtype}")
    if not case.replaces and not case.whole:
        kinds = {t.dtype for t in learning(model, "default")}
        expect(kinds == {SINGLE}, f"an adapter kept in float32, not {kinds}")
    if not case.replaces and case.merges:
        near(
            y, by_weight(model, case, merged_weights(model)), dtype, what=f"forward(x) is op(x, transform(W)), {dtype}"
        )
        model.merge_adapter()
        near(run(model, case, dtype), y, dtype, what=f"the merged model's output is the unmerged one's, {dtype}")
