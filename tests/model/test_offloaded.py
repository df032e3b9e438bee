# SPDX-License-Identifier: Apache-2.0
"""Models whose weights accelerate keeps elsewhere between calls: adapted before and after, merged, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftlet
from graftlet.errors import MergeError
from tests.model.models import adapted, llama, load, logits, lora, move, save

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
CONFIGS: dict[str, Any] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "loha": graftlet.LoHaConfig(target_modules=["q_proj"], r=2),
    "oft": graftlet.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "vera": graftlet.VeraConfig(target_modules=["q_proj"], r=2),
    "lora-bias": lora(bias="lora_only", modules_to_save=["lm_head"]),
}
configs = pytest.mark.parametrize("name", CONFIGS)


def moved(name: str) -> Any:
    model = adapted(llama(), CONFIGS[name])
    move(model)
    return model


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


@configs
def test_an_adapted_model_is_offloaded(name: str) -> None:
    model = moved(name)
    wanted = logits(model)
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert all(p.is_meta for p in model.parameters())
    assert near(logits(model), wanted)


@configs
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_an_offloaded_model_is_adapted(name: str, disk: bool, tmp_path: Path) -> None:
    model = moved(name)
    save(model, tmp_path / "adapter")
    base: Any = llama()
    if disk:
        accelerate.disk_offload(base, str(tmp_path / "disk"), execution_device=CPU)
    else:
        accelerate.cpu_offload(base, execution_device=CPU)
    other = load(base, tmp_path / "adapter")
    assert near(logits(other), logits(model))
    save(other, tmp_path / "again")
    assert near(logits(load(llama(), tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "lora-bias"])
def test_merging_into_offloaded_weights(name: str) -> None:
    model = moved(name)
    wanted = logits(model)
    accelerate.cpu_offload(base := llama(), execution_device=CPU)
    plain = logits(base)
    other = adapted(base, CONFIGS[name])
    move(other)
    assert near(logits(other), wanted)
    other.merge_adapter()
    assert near(logits(other), wanted)
    other.unmerge_adapter()
    with other.disable_adapter():
        assert logits(other).equal(plain)


def test_what_is_on_disk_is_not_merged_into(tmp_path: Path) -> None:
    accelerate.disk_offload(base := llama(), str(tmp_path), execution_device=CPU)
    model = adapted(base, lora())
    move(model)
    before = logits(model)
    with pytest.raises(MergeError, match="keeps it on disk"):
        model.merge_adapter()
    assert logits(model).equal(before)
