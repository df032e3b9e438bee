# SPDX-License-Identifier: Apache-2.0
"""Combinations of adapters, for every registered method: what the new adapter does is the weighted sum of what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlet.core.host import hosts
from graftlet.core.layer import widened
from graftlet.core.replace import Replacement
from graftlet.errors import ConfigError, MergeError
from graftlet.model.peft_model import PeftModel
from graftlet.testing.benches import layers, near, snapshot
from graftlet.testing.laws import mergeable
from graftlet.testing.running import SINGLE, adapted, run, second

from .cases import Case
from .test_laws import linear, representative, table

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")

WEIGHTS = {"default": 0.7, "other": -0.4}


def combinable(case: Case) -> bool:
    """It has a merged form, and can stand beside the LoRA that it becomes a part of."""
    return mergeable(case) and not case.config().picky


def pair(case: Case) -> PeftModel:
    model = adapted(case)
    second(model, case)
    return model


def combined(model: PeftModel, kind: str = "exact", **options: Any) -> Any:
    return model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", kind, **options)


@torch.no_grad()
def changes(model: PeftModel, name: str) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What an adapter adds to each weight and bias."""
    found = {}
    for path, layer in layers(model).items():
        W, b = widened(*layer.original())
        found[path] = layer.methods[name].change(layer.view(name, SINGLE), W, b)
    return found


def bias_on_attention(case: Case, model: PeftModel) -> bool:
    """A bias that LoRA, which has none there, cannot hold."""
    biased = [db for name in WEIGHTS for _, db in changes(model, name).values() if db is not None and db.any()]
    return bool(biased) and any(layer.site.opaque or not layer.site.has_bias for layer in layers(model).values())


@table(quick=representative, only=combinable)
def test_an_exact_combination_is_the_weighted_sum_of_the_changes(case: Case) -> None:
    model = pair(case)
    if bias_on_attention(case, model):
        before = snapshot(model)
        with pytest.raises(ConfigError):
            combined(model)
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        return
    y, fits = run(model, case), combined(model)
    near(run(model, case), y, SINGLE)  # it is there, but does not act
    assert "sum" not in model.active_adapters
    parts = {name: changes(model, name) for name in [*WEIGHTS, "sum"]}
    for path, (W, b) in parts["sum"].items():
        site = layers(model)[path].site
        expected = sum(weight * site.fit(parts[n][path][0], W) for n, weight in WEIGHTS.items())
        near(W, expected, SINGLE, steps=64)
        known = [weight * db for n, weight in WEIGHTS.items() if (db := parts[n][path][1]) is not None]
        if known:
            near(torch.zeros(site.features_out) if b is None else b, sum(known), SINGLE, steps=64)
    for _, host in hosts(model):
        if isinstance(host, Replacement):
            base = host.pristine.state_dict()
            for key, tensor in host.copies["sum"].state_dict().items():
                moved = sum(w * (host.copies[n].state_dict()[key] - base[key]) for n, w in WEIGHTS.items())
                near(tensor - base[key], moved, SINGLE, steps=64)
    assert all(fit.error < 1e-5 for fit in fits.values())
    model.set_adapter("sum")
    y = run(model, case)
    model.merge_adapter()
    near(run(model, case), y, SINGLE, steps=16)


@table(quick=linear, only=combinable)
@pytest.mark.parametrize("kind", ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_kinds_that_prune_work_on_the_changes(case: Case, kind: str) -> None:
    """With everything kept and one sign, pruning leaves the sum; with half of it, something else."""
    model = pair(case)
    if bias_on_attention(case, model):
        pytest.skip("a bias that LoRA cannot hold")
    torch.manual_seed(0)
    whole = model.add_weighted_adapter(list(WEIGHTS), [0.5, 0.5], "whole", kind, svd_rank=96, density=1.0)
    half = model.add_weighted_adapter(list(WEIGHTS), [0.5, 0.5], "half", kind, svd_rank=96, density=0.5)
    assert set(whole) == set(half)
    for path in layers(model):
        one, two = changes(model, "whole")[path][0], changes(model, "half")[path][0]
        assert torch.isfinite(one).all()
        assert torch.isfinite(two).all()
        if "ties" not in kind:
            site = layers(model)[path].site
            expected = sum(0.5 * site.fit(changes(model, n)[path][0], one) for n in WEIGHTS)
            near(one, expected, SINGLE, steps=64)


@table(quick=linear, only=lambda c: not (mergeable(c) or c.whole) and c.entry.method.unmergeable is not None)
def test_what_has_no_weight_to_add_up_says_so(case: Case) -> None:
    model = pair(case)
    before = snapshot(model)
    with pytest.raises(MergeError):
        combined(model)
    assert list(model.peft_config) == ["default", "other"]
    assert before.keys() == model.state_dict().keys()
