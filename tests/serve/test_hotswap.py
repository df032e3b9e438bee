# SPDX-License-Identifier: Apache-2.0
"""Another adapter in the place of one that is there: for every method, whole or not at all, and compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import graftlet
from graftlet.core.replace import Replacement
from graftlet.errors import AdapterFileError, AdapterNameError, CallError, CallWarning, ConfigError, MergeError
from graftlet.testing.benches import perturb, snapshot
from graftlet.testing.running import adapted, fresh, run, same
from graftlet.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests.laws.cases import Case
from tests.laws.test_laws import linear, representative, table
from tests.model.models import IDS, llama, load, lora, save

pytestmark = pytest.mark.filterwarnings("ignore::graftlet.errors.StartWarning")


def on_layers(case: Case) -> bool:
    """It acts in layers: a swap is of their tensors."""
    return not case.whole


@table(quick=representative, only=on_layers)
def test_an_adapter_of_equal_structure_takes_the_place(case: Case, tmp_path: Path) -> None:
    model, other = adapted(case), fresh(case)
    perturb(other, seed=21)
    other.save_pretrained(str(tmp_path))
    before = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    hotswap_adapter(model, tmp_path, "default")
    same(run(model, case), run(other, case))
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == before


@table(quick=linear, only=on_layers)
def test_a_bad_file_leaves_the_old_one_serving(case: Case, tmp_path: Path) -> None:
    model, other = adapted(case), fresh(case)
    perturb(other, seed=21)
    tensors = graftlet.get_peft_model_state_dict(other)
    y, before = run(model, case), snapshot(model)
    key = next(k for k, t in tensors.items() if t.is_floating_point())
    broken: list[dict[str, Tensor]] = [
        {**tensors, key: torch.full_like(tensors[key], float("nan"))},
        {**tensors, key: tensors[key].new_zeros(*tensors[key].shape, 2)},
        {**tensors, "base_model.model.l.base_layer.weight": torch.zeros(3)},
    ]
    for given in broken:
        with pytest.raises(AdapterFileError):
            hotswap_adapter_from_state_dict(model, given, "default", case.config())
    with pytest.raises(AdapterNameError):
        hotswap_adapter_from_state_dict(model, tensors, "nobody", case.config())
    after = model.state_dict()
    assert all(before[k].equal(after[k]) for k in before)
    same(run(model, case), y)


# whole models


def saved(folder: Path, seed: int = 0, **values: Any) -> tuple[str, Tensor]:
    """A saved adapter, and what its model gives."""
    model = graftlet.get_peft_model(llama(), lora(**values)).eval()
    perturb(model, seed=seed)
    save(model, folder)
    return str(folder), outputs(model)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, tuple[str, Tensor]]:
    targets = ["q_proj", "v_proj"]
    kinds: dict[str, dict[str, Any]] = {
        "first": {"r": 4, "lora_alpha": 8},
        "other": {"r": 4, "lora_alpha": 3},
        "small": {"r": 2, "lora_alpha": 16},
        "large": {"r": 8, "lora_alpha": 16},
        "rs": {"r": 3, "lora_alpha": 5, "use_rslora": True},
        "patterns": {"r": 2, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 9}},
        "fewer": {"r": 4, "target_modules": ["q_proj"]},
    }
    return {
        name: saved(tmp_path / name, seed, **{"target_modules": targets, **values})
        for seed, (name, values) in enumerate(kinds.items())
    }


def test_ranks_scalings_and_targets_may_differ(folders: dict[str, tuple[str, Tensor]], tmp_path: Path) -> None:
    model = load(llama(), folders["first"][0])
    for name in ("other", "small", "large", "patterns", "rs", "fewer", "first"):
        folder, expected = folders[name]
        hotswap_adapter(model, folder, "default")
        torch.testing.assert_close(outputs(model), expected)
        save(model, tmp_path / "again")
        torch.testing.assert_close(outputs(load(llama(), tmp_path / "again")), expected)


def test_one_compilation_serves_all(folders: dict[str, tuple[str, Tensor]]) -> None:
    torch._dynamo.reset()
    counts: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counts.append(1)
        return graph.forward

    model = load(llama(), folders["small"][0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(outputs(model), folders["small"][1])
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(outputs(compiled), folders["small"][1])
    once = len(counts)
    assert once
    for name in ("first", "large", "other", "rs", "patterns", "fewer", "small"):
        hotswap_adapter(compiled, folders[name][0], "default")
        torch.testing.assert_close(outputs(compiled), folders[name][1])
        assert len(counts) == once, f"compiled again for {name}"


def test_equal_adapters_need_no_preparation(folders: dict[str, tuple[str, Tensor]], tmp_path: Path) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = load(llama(), folders["first"][0])
    compiled = torch.compile(model, backend=counter)
    outputs(compiled)
    once = counter.frame_count
    folder, expected = saved(tmp_path / "more", 31, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    hotswap_adapter(compiled, folder, "default")
    torch.testing.assert_close(outputs(compiled), expected)
    assert counter.frame_count == once


def test_what_cannot_be_swapped_says_so(folders: dict[str, tuple[str, Tensor]], tmp_path: Path) -> None:
    model = load(llama(), folders["fewer"][0])
    y = outputs(model)
    with pytest.raises(AdapterFileError, match="not part of this adapter"):
        hotswap_adapter(model, folders["first"][0], "default")
    dropped, _ = saved(tmp_path / "dropped", lora_dropout=0.1)
    with pytest.raises(ConfigError, match="lora_dropout"):
        hotswap_adapter(model, dropped, "default")
    dora, _ = saved(tmp_path / "dora", use_dora=True)
    with pytest.raises(ConfigError, match="use_dora"):
        hotswap_adapter(model, dora, "default")
    other = graftlet.get_peft_model(llama(), graftlet.VeraConfig(target_modules=["q_proj"]))
    save(other, tmp_path / "vera")
    with pytest.raises(ConfigError, match="VERA"):
        hotswap_adapter(model, tmp_path / "vera", "default")
    assert outputs(model).equal(y)
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged"):
        hotswap_adapter(model, folders["fewer"][0], "default")


def test_preparing_too_late_or_too_low(folders: dict[str, tuple[str, Tensor]]) -> None:
    model = load(llama(), folders["first"][0])
    with pytest.raises(CallError, match="rank 4"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(CallError, match="no adapter"):
        prepare_model_for_compiled_hotswap(llama())
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(CallError, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(CallWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    config = lora(rank_pattern={"x": 3})
    prepare_model_for_compiled_hotswap(compiled, target_rank=6, config=config, check_compiled="ignore")
    assert (config.r, config.rank_pattern, model.peft_config["default"].r) == (6, {"x": 6}, 6)
    torch.testing.assert_close(outputs(model), folders["first"][1])


def test_whole_modules_are_swapped_too(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path / "a", 3, modules_to_save=["lm_head"])
    start, _ = saved(tmp_path / "b", 4, modules_to_save=["lm_head"])
    model = load(llama(), start)
    hotswap_adapter(model, folder, "default")
    torch.testing.assert_close(outputs(model), expected)
    assert any(isinstance(m, Replacement) for m in model.modules())
