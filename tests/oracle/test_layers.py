# SPDX-License-Identifier: Apache-2.0
"""Layers against the reference: the same keys and shapes in memory, and from the same tensors the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftlet.testing.benches import layers, near
from tests.laws.cases import Case, cases

from .reference import Pair, adapt, output

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")

CASES = [pytest.param(c, id=str(c)) for c in cases() if c.setting != "qalora" and not c.whole]
"""All on layers, but what the reference has for layers of GPTQ alone, which has tests of its own."""

ANY = "any setting"
FORWARD = {
    ("OFT", ANY, "conv2"): "rotates overlapping patches and folds them back, which is no convolution",
    ("OFT", ANY, "grouped"): "rotates over the inputs of all groups",
    ("LORA", ANY, "dilated"): "ignores dilation and padding mode in the adapter's own convolution",
    ("LORA", "dora", "grouped"): "does not scale the adapted weight's rows",
    ("LORA", "olora", "conv1d"): "decomposes the weight as it lies, the wrong way round",
    ("LORA", ANY, "attention"): "adds the update of out_proj twice",
    ("LORA", ANY, "attention-time-first"): "adds the update of out_proj twice",
    ("HIRA", ANY, "dilated"): "ignores the padding mode in the adapter's own convolution",
    ("HIRA", ANY, "scaled-embedding"): "leaves the embedding's scale out of the update",
    ("BOFT", ANY, "dilated"): "fails on padding given as a word",
    ("ADALORA", ANY, "grouped"): "makes a change over the inputs of all groups, which the layer cannot take",
    ("ADALORA", ANY, "dilated"): "ignores the padding mode in the adapter's own convolution",
    ("HRA", ANY, "dilated"): "fails on padding given as a word",
    ("TRAINABLE_TOKENS", ANY, "linear"): "drops the layer's bias",
    ("LOHA", ANY, "dilated"): "ignores the padding mode in the adapter's own convolution",
    ("LOKR", ANY, "dilated"): "ignores the padding mode in the adapter's own convolution",
    ("LOKR", "both", "conv1"): "fails on a core tensor with a one-dimensional kernel",
    ("TINYLORA", ANY, "scaled-embedding"): "leaves the embedding's scale out of the update",
}
"""Where the reference's forward is wrong, and how. `docs/differences.md` has them all."""

MERGED = {
    ("LORA", "olora", "conv1d"): "decomposes the weight as it lies, the wrong way round",
    ("LOKR", "both", "conv1"): "fails on a core tensor with a one-dimensional kernel",
    ("OFT", ANY, "grouped"): "cannot merge it",
    ("ADALORA", ANY, "grouped"): "cannot merge it",
    ("LORA", ANY, "attention"): "adds the update of out_proj twice",
    ("LORA", ANY, "attention-time-first"): "adds the update of out_proj twice",
}


def awaited(known: dict[tuple[str, str, str], str]) -> Any:
    """The cases; those where the reference is known to be wrong must differ, or this table is out of date."""
    rows = []
    for param in CASES:
        case: Case = param.values[0]  # type: ignore[assignment]
        name, bench = case.entry.name, case.bench.name
        why = known.get((name, ANY, bench)) or known.get((name, case.setting, bench))
        marks = [pytest.mark.xfail(reason=f"the reference {why}", strict=True)] if why else []
        rows.append(pytest.param(case, id=param.id, marks=marks))
    return pytest.mark.parametrize("case", rows)


def equal_pair(case: Case, dtype: torch.dtype = torch.float32, in_place: bool = False) -> Pair:
    """Both models with the reference's tensors."""
    pair = adapt(case, dtype, in_place)
    given = pair.theirs.state_dict()
    for key in pair.ours.state_dict().keys() - given.keys():  # adapted in place, it has what is shared on layers alone
        given[key] = given[next(again for again in surplus(pair) if again.endswith(f".{key}"))]
    missing, unexpected = pair.ours.load_state_dict(given, strict=False)
    assert not missing
    assert not set(unexpected) - surplus(pair)
    _copy_hidden(pair)
    return pair


def surplus(pair: Pair) -> set[str]:
    """What the reference has in memory beside what it needs.

    Shared tensors once more on each layer, some that are drawn anew at every load, and dense zeros.
    """
    found = {key for key, t in pair.theirs.state_dict().items() if key.endswith(".zeros") and not t.any()}
    for path, layer in layers(pair.ours).items():
        for name, box in layer.commons.get("default", {}).items():
            found |= {f"{path}.{name}.default{entry and '.'}{entry}" for entry in box.tensors("default")}
        found |= {f"{path}.{name}.default" for name, spec in layer.specs["default"].items() if not spec.persistent}
    return found


def taught(model: torch.nn.Module, again: set[str]) -> set[str]:
    """The names of what learns; what layers share goes by its name at the root."""
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad} - again


def _copy_hidden(pair: Pair) -> None:
    """Tensors that stand in files but not in `state_dict()`: the reference keeps them as plain attributes."""
    for path, layer in layers(pair.ours).items():
        for name, spec in layer.specs["default"].items():
            if not spec.persistent and spec.saved:
                layer.tensor("default", name).copy_(getattr(pair.theirs.get_submodule(path), name)["default"])


@pytest.mark.parametrize("case", CASES)
def test_keys_shapes_and_dtypes_in_memory(case: Case) -> None:
    if (case.entry.name, case.bench.name) in (("OFT", "grouped"), ("ADALORA", "grouped")):
        pytest.skip("the reference works over the inputs of all groups, and cannot merge that")
    if (case.setting, case.bench.name) == ("olora", "conv1d"):
        pytest.skip("the reference decomposes the weight the wrong way round")
    pair = adapt(case)
    ours = {k: (tuple(t.shape), t.dtype) for k, t in pair.ours.state_dict().items()}
    theirs = {k: (tuple(t.shape), t.dtype) for k, t in pair.theirs.state_dict().items()}
    assert ours == {k: t for k, t in theirs.items() if k not in surplus(pair)}
    assert taught(pair.ours, set()) == taught(pair.theirs, surplus(pair))


@awaited(FORWARD)
def test_outputs_are_the_references(case: Case) -> None:
    pair, inputs = equal_pair(case), case.bench.example()
    near(output(pair.ours, inputs, case), output(pair.theirs, inputs, case), torch.float32, steps=16)


@awaited(MERGED)
def test_merged_outputs_are_the_references(case: Case) -> None:
    if not case.merges:
        pytest.skip("has no merged form")
    pair, inputs = equal_pair(case), case.bench.example()
    pair.theirs.merge_adapter()
    pair.ours.merge_adapter()
    near(output(pair.ours, inputs, case), output(pair.theirs, inputs, case), torch.float32, steps=16)


def half(case: Any) -> bool:
    return case.first and case.bench.name in ("no-bias", "embedding")


@pytest.mark.parametrize("in_place", [True, False], ids=["adapter in bfloat16", "adapter in float32"])
@pytest.mark.parametrize("case", [p for p in CASES if half(p.values[0])])
def test_outputs_on_a_bfloat16_base(case: Case, in_place: bool) -> None:
    if in_place and case.entry.name == "POLY":
        pytest.skip("the reference takes the rows' tasks in its wrapper alone")
    pair, inputs = equal_pair(case, torch.bfloat16, in_place), case.bench.example(torch.bfloat16)
    ours, theirs = output(pair.ours, inputs, case), output(pair.theirs, inputs, case)
    assert ours.dtype == theirs.dtype
    near(ours, theirs, torch.bfloat16)


def test_every_method_is_compared_somewhere() -> None:
    compared = set()
    for param in CASES:
        case: Case = param.values[0]  # type: ignore[assignment]
        if case.entry.name not in compared:
            try:
                adapt(case)
                compared.add(case.entry.name)
            except pytest.skip.Exception:
                continue
    assert compared == {p.values[0].entry.name for p in CASES}
