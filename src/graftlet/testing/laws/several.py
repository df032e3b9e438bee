# SPDX-License-Identifier: Apache-2.0
"""How adapters of a method stand together: active at once, row by row, and under any name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.context import Call, using
from ...core.layer import AdaptedLayer, widened
from ...core.method import Weights
from ...core.prompt import Prompt
from ...errors import CallError, ConfigError
from ...model.peft_model import PeftModel
from ...weights.site import Attention, Parameter
from ..benches import BATCH, layers, near
from ..case import Case
from ..running import SINGLE, adapted, by_weight, expect, refuses, run, same, scratch, second, stripped


def two_active_adapters_follow_the_declared_law(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    found, both = layers(model), ["default", "other"]
    law = next(iter(found.values())).methods["default"].law
    if law == "one":
        refuses(ConfigError, lambda: model.set_adapter(both), "two adapters of a method of law 'one' are refused")
        return
    expected = {key: together(layer, law, both) for key, layer in found.items()}
    model.set_adapter(both)
    y = run(model, case)
    near(y, by_weight(model, case, expected), SINGLE, 16, f"two adapters act by the law {law!r}")
    model.merge_adapter()
    near(run(model, case), y, SINGLE, 16, "two adapters merged at once act as unmerged")
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    near(run(model, case), y, SINGLE, 16, "two adapters merged one after the other act as unmerged")


def together(layer: AdaptedLayer, law: str, names: list[str]) -> Weights:
    """A layer's weight with two adapters, by the law's own definition."""
    W0, b0 = widened(*layer.site.read())
    one, two = (layer.methods[n] for n in names)
    p, q = (layer.view(n) for n in names)
    W1, b1 = one.apply(p, W0, b0)
    if law == "chain":
        return two.apply(q, W1, b1)
    W2, b2 = two.apply(q, W0, b0)
    b = None if b1 is None or b2 is None else b1 + b2 - (0 if b0 is None else b0)
    return W1 + W2 - layer.site.fit(W0, W1), b


def a_mixed_batch_gives_each_row_its_adapter(case: Case) -> None:
    model = adapted(case)
    second(model, case)
    model.eval()
    rows = ["default", "__base__", "other", "default"]
    expect(len(rows) == BATCH, f"{BATCH} rows")

    def mixed() -> Tensor:
        if case.whole:
            return run(model, case, adapter_names=rows)
        with using(Call(tuple(rows))):
            return run(model, case)

    if not mixable(case):
        refuses(CallError, mixed, "a mixed batch is refused")
        return
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = run(model, case)
    with model.disable_adapter():
        alone["__base__"] = run(model, case)
    dim = case.bench.batch
    expected = torch.stack([alone[name].select(dim, i) for i, name in enumerate(rows)], dim)
    near(mixed(), expected, SINGLE, what="each row of a mixed batch is as if its adapter were alone")


def mixable(case: Case) -> bool:
    """Whether rows of a batch can go through different adapters: there is one input and one output to part by rows."""
    if case.replaces:
        return case.bench.kind is not Attention
    if case.whole:
        return issubclass(case.entry.method, Prompt)
    return case.bench.kind is not Parameter and not case.entry.method.unmixable


def an_adapter_may_have_any_name(case: Case, name: str = "weight") -> None:
    y = run(adapted(case), case)
    model = adapted(case, name=name)
    same(run(model, case), y, f"an adapter called {name!r} acts as any other")
    with scratch() as place:
        model.save_pretrained(place)
        folder = Path(place) if name == "default" else Path(place) / name
        again = PeftModel.from_pretrained(case.bench.model(), folder, name, config=case.config()).eval()
    same(run(again, case), y, f"an adapter called {name!r} is saved and loaded")
    model.delete_adapter(name)
    expect(name not in model.peft_config, f"no adapter {name!r} after it was deleted")


def a_deleted_adapter_leaves_the_others_and_the_base(case: Case) -> None:
    model = adapted(case)
    y, base = run(model, case), run(stripped(model, case), replace(case, call={}))
    second(model, case)
    model.set_adapter("other")
    model.delete_adapter("other")
    same(run(model, case), y, "an adapter acts as before once one beside it is deleted")
    model.delete_adapter("default")
    left = [n for n, t in model.named_parameters() if ".default" in n and t.requires_grad]
    expect(not left, f"nothing of a deleted adapter, not {left}")
    if not case.rebased:
        same(run(model, replace(case, call={})), base, "without its last adapter a model is its base")
