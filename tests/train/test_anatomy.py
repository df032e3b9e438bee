# SPDX-License-Identifier: Apache-2.0
"""What `inspect` says of an adapter is what the dense deltas say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from graftlet import LoraConfig, get_peft_model
from graftlet.errors import AdapterFileError
from graftlet.train.anatomy import anatomy_page, effective_rank, read_anatomy, spectrum
from graftlet.train.comparison import compared

from . import tiny


def adapter(folder: Path, **fields: object) -> torch.nn.Module:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **fields)  # type: ignore
    model = get_peft_model(tiny.model(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}}],
    ids=str,
)
def test_norms_and_ranks_are_those_of_the_dense_delta(tmp_path: Path, fields: dict[str, object]) -> None:
    model = adapter(tmp_path, **fields)
    before = {n: p.detach().clone() for n, p in model.base_model.model.named_parameters() if "base_layer" in n}  # type: ignore
    model.merge_adapter()  # type: ignore[operator]
    after = dict(model.base_model.model.named_parameters())  # type: ignore
    facts = read_anatomy(tmp_path)
    assert len(facts["layers"]) == len(before) == 4
    for layer in facts["layers"]:
        name = layer["name"] + ".base_layer.weight"
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert layer["norm"] == pytest.approx(values.norm().item(), rel=1e-5)
        shares = values[: layer["rank"]] / values[: layer["rank"]].sum()
        assert layer["effective_rank"] == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)
        torch.testing.assert_close(
            torch.tensor(layer["singular_values"]).double(), values[: layer["rank"]], rtol=1e-4, atol=1e-5
        )
        assert layer["shape"] == list(before[name].shape)


class Experts(torch.nn.Module):
    """Two stacks of three experts, `[experts, out, in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 12, 8))
        self.down = torch.nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->beo", self.down @ self.up, x).sum(1)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = Experts(), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x))


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"experts.up": 4}}, {"use_rslora": True}], ids=str)
def test_stacks_of_experts_are_measured_expert_by_expert(tmp_path: Path, fields: dict[str, object]) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, lora_alpha=6, target_modules=["head"], target_parameters=["experts.up", "experts.down"], **fields
        )  # type: ignore
        model = get_peft_model(Block(), config)
        torch.manual_seed(5 + seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(str(tmp_path / str(seed)))
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n and "bias" not in n}
        model.merge_adapter()  # type: ignore[operator]
        after = dict(model.named_parameters())
        found.append([(after[n] - t).double() for n, t in before.items()])
    norms = sorted(float(change.norm()) for change in found[0])
    facts = read_anatomy(tmp_path / "0")["layers"]
    assert sorted(layer["norm"] for layer in facts) == pytest.approx(norms, rel=1e-5)
    stacks = [layer for layer in facts if "experts" in layer["name"]]
    assert sorted(layer["shape"] for layer in stacks) == [[3, 8, 12], [3, 12, 8]]
    for layer in stacks:
        change = next(c for c in found[0] if list(c.shape) == layer["shape"])
        values = torch.linalg.svdvals(change)[:, : layer["rank"]]
        expected = values.flatten().sort(descending=True).values
        assert layer["singular_values"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert layer["effective_rank"] == pytest.approx(sum(map(effective_rank, values)) / 3, rel=1e-4)
    told = compared(tmp_path / "0", tmp_path / "1")["layers"]
    distances = sorted(float((a - b).norm()) for a, b in zip(*found, strict=True))
    assert sorted(layer["distance"] for layer in told) == pytest.approx(distances, rel=1e-5)


def test_factors_and_zero_deltas() -> None:
    a, b = torch.randn(3, 20), torch.randn(7, 3)
    dense = torch.linalg.svdvals(b @ a)[:3].double()
    torch.testing.assert_close(spectrum(a, b), dense, rtol=1e-5, atol=1e-5)
    assert effective_rank(spectrum(a, torch.zeros_like(b))) == 0.0
    assert effective_rank(torch.ones(3)) == pytest.approx(3)


def test_rank_above_a_dimension() -> None:
    assert spectrum(torch.randn(8, 3), torch.randn(5, 8)).shape == (3,)


def test_a_page_with_and_without_factors(tmp_path: Path) -> None:
    adapter(tmp_path)
    facts = read_anatomy(tmp_path)
    assert "model.layers.1.mlp.down_proj" in anatomy_page(facts)
    page = anatomy_page({**facts, "layers": []})
    assert "lora_A.weight" in page
    assert "http" not in page


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="adapter_config.json"):
        read_anatomy(tmp_path)
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterFileError, match="safetensors"):
        read_anatomy(tmp_path)
