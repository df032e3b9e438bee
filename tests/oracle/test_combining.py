# SPDX-License-Identifier: Apache-2.0
"""Weighted combinations against the reference: the same numbers under the same names, from the same adapters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftlet
from graftlet.core.arithmetic import RULES, Cut, of_matrices, of_products
from graftlet.testing.benches import BENCHES, near, seeded

from .reference import move, peft

WEIGHTS = {"two": [0.7, 0.5], "negative": [0.8, -0.6]}
NAMES = ["default", "other"]


@torch.no_grad()
def told(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """A model's output."""
    return model(*inputs)


def both(library: Any, bench: str, ranks: tuple[int, int] = (4, 4), **values: Any) -> Any:
    """A model with two LoRA adapters, by one library."""
    values = {"lora_alpha": 6, "target_modules": ["l"], **values}
    with seeded(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(BENCHES[bench].model(), library.LoraConfig(r=ranks[0], **values))
        model.add_adapter("other", library.LoraConfig(r=ranks[1], **values))
    return model.eval()


def pair(bench: str, **values: Any) -> tuple[Any, Any]:
    """The same by both libraries, with the same tensors."""
    theirs, ours = both(peft, bench, **values), both(graftlet, bench, **values)
    with torch.no_grad(), seeded(7):
        for _, parameter in sorted(theirs.named_parameters()):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def combined(model: nn.Module, bench: str, weights: list[float], kind: str, **options: Any) -> Tensor:
    with warnings.catch_warnings(), seeded(11):
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(NAMES, weights, "sum", combination_type=kind, **options)
        model.set_adapter("sum")
    return told(model, BENCHES[bench].example())


EXACT = ["linear", "cat", "svd"]
PRUNING = ["ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]


@pytest.mark.parametrize("bench", ["linear", "conv1d", "conv2", "pointwise", "embedding"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("kind", [*EXACT, *PRUNING])
def test_combinations_give_the_references_outputs(bench: str, weights: list[float], kind: str) -> None:
    theirs, ours = pair(bench)
    options = {"density": 0.6} if kind in PRUNING else {}
    near(
        combined(ours, bench, weights, kind, **options),
        combined(theirs, bench, weights, kind, **options),
        torch.float32,
        32,
    )


@pytest.mark.parametrize("kind", EXACT)
def test_keys_and_shapes_are_the_references(kind: str) -> None:
    theirs, ours = pair("linear")
    for model in (theirs, ours):
        combined(model, "linear", [0.7, 0.5], kind)
    found, wanted = ({k: t.shape for k, t in m.state_dict().items()} for m in (ours, theirs))
    assert found == wanted
    assert ours.peft_config["sum"].r == theirs.peft_config["sum"].r
    assert ours.peft_config["sum"].lora_alpha == theirs.peft_config["sum"].lora_alpha


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_the_sign_is_elected_as_in_the_reference(kind: str, method: str) -> None:
    theirs, ours = pair("linear")
    options = {"density": 0.5, "majority_sign_method": method}
    near(
        combined(ours, "linear", [0.3, 1.0], kind, **options),
        combined(theirs, "linear", [0.3, 1.0], kind, **options),
        torch.float32,
        32,
    )


@pytest.mark.parametrize("options", [{"svd_rank": 2}, {"svd_rank": 2, "svd_clamp": 0.9}, {"svd_full_matrices": False}])
def test_options_of_svd(options: dict[str, Any]) -> None:
    theirs, ours = pair("linear")
    near(
        combined(ours, "linear", [0.7, 0.5], "svd", **options),
        combined(theirs, "linear", [0.7, 0.5], "svd", **options),
        torch.float32,
        32,
    )


def test_unequal_ranks() -> None:
    for kind in ("cat", "svd"):
        theirs, ours = pair("linear", ranks=(4, 2))
        near(
            combined(ours, "linear", [0.7, 0.5], kind), combined(theirs, "linear", [0.7, 0.5], kind), torch.float32, 32
        )


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("by", ["total", "frequency"])
def test_rules_on_tensors_are_the_references(kind: str, by: str) -> None:
    """Random pruning too, from the same seed."""
    from peft.utils import merge_utils

    with seeded(5):
        tensors, weights = [torch.randn(6, 9) for _ in range(3)], [0.5, -1.5, 0.25]
    function = getattr(merge_utils, {"linear": "task_arithmetic"}.get(kind, kind))
    options = {} if kind == "linear" else {"density": 0.7}
    signs = {"majority_sign_method": by} if "ties" in kind else {}
    with seeded(8):
        theirs = function(tensors, torch.tensor(weights), **options, **signs)
    with seeded(8):
        ours = RULES[kind](tensors, weights, options.get("density"), by)
    torch.testing.assert_close(ours, theirs)


def test_the_small_core_gives_what_the_dense_matrix_gives() -> None:
    ours = pair("linear")[1]
    layer = ours.base_model.model.l
    parts = [layer.methods[n].factored(layer.view(n)) for n in NAMES]
    with torch.no_grad():
        dense = sum(w * f.scale * f.B @ f.A for w, f in zip((0.7, -0.5), parts, strict=True))
        for cut in (Cut(3), Cut(energy=0.9), Cut()):
            (small, lost), (large, also) = of_products(parts, (0.7, -0.5), cut), of_matrices(dense, cut)
            near(small.B @ small.A, large.B @ large.A, torch.float32)
            assert small.A.shape == large.A.shape
            assert lost == pytest.approx(also, abs=1e-6)
            assert lost == pytest.approx(float((dense - small.B @ small.A).norm() / dense.norm()), abs=1e-6)


def test_ia3_adds_up_its_scales() -> None:
    made = []
    for library in (peft, graftlet):
        with seeded(1):
            config = {"target_modules": ["l"], "feedforward_modules": []}
            model = library.get_peft_model(BENCHES["linear"].model(), library.IA3Config(**config))
            model.add_adapter("other", library.IA3Config(**config))
        model.eval()
        with torch.no_grad():
            for number, (_, parameter) in enumerate(sorted(p for p in model.named_parameters() if "ia3_l" in p[0])):
                parameter.copy_(torch.linspace(0.5, 2.0 + number, 12)[:, None])
        model.add_weighted_adapter(NAMES, [0.6, 0.7], "sum")
        model.set_adapter("sum")
        made.append(told(model, BENCHES["linear"].example()))
    near(made[1], made[0], torch.float32)


def test_a_combination_is_read_by_the_reference(tmp_path: Any) -> None:
    """Ranks that differ a layer stand in the config."""
    ours = both(graftlet, "linear", ranks=(4, 2))
    move(ours)
    ours.add_weighted_adapter(NAMES, [0.7, 0.5], "sum", "exact", energy=0.8)
    ours.set_adapter("sum")
    y = told(ours, BENCHES["linear"].example())
    ours.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    theirs = peft.PeftModel.from_pretrained(BENCHES["linear"].model(), str(tmp_path / "sum")).eval()
    near(told(theirs, BENCHES["linear"].example()), y, torch.float32)
