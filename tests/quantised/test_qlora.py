# SPDX-License-Identifier: Apache-2.0
"""QLoRA as it is used: a model that transformers loads in 4 or 8 bits, trained, saved, loaded, merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import graftlet
from graftlet.errors import RoundingWarning, UnsupportedLayerError
from graftlet.train.recipe import check
from graftlet.train.run import train

from ..train import tiny

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
WAYS = {
    "nf4": {**FOUR, "bnb_4bit_compute_dtype": torch.float32},
    "nf4-brain": {**FOUR, "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
IDS = torch.arange(18).reshape(2, 9) % 200


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def load(folder: Path, way: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**WAYS[way])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype)


def learn(model: Any, steps: int = 3) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def test_a_copy_of_packed_numbers_is_refused(base: Path) -> None:
    model = load(base, "nf4")
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(UnsupportedLayerError, match="a Linear4bit's numbers are packed"):
        graftlet.get_peft_model(model, graftlet.LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"]))
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("way", WAYS)
def test_load_train_save_load_merge(base: Path, way: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if way == "nf4-brain" else torch.float32
    model = graftlet.prepare_model_for_kbit_training(load(base, way, dtype))
    adapted = graftlet.get_peft_model(
        model, graftlet.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    first, *_, last = learn(adapted)
    assert last < first
    y = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    fresh = graftlet.prepare_model_for_kbit_training(load(base, way, dtype))
    again = graftlet.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), y)

    dense: Any = again.merge_and_unload(dequantize=True)
    assert not any(type(p) is not nn.Parameter for p in dense.parameters())
    scale = float(y.abs().max())
    # 8-bit layers round what goes into them as well, which a dense model does not
    allowed = {"nf4": 1e-5, "nf4-brain": 2e-2, "int8": 2e-2}[way]
    assert (logits(dense) - y).abs().max() <= allowed * scale
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())

    with pytest.warns(RoundingWarning, match="14 quantised layers"):
        packed: Any = adapted.merge_and_unload()
    errors = graftlet.merge_errors(packed)
    assert len(errors) == 14
    assert max(e.weight for e in errors.values()) < (0.02 if way == "int8" else 0.15)


def test_preparing_does_what_the_reference_does(base: Path) -> None:
    peft = pytest.importorskip("peft")
    for options in (
        {},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"use_gradient_checkpointing": False},
    ):
        ours = graftlet.prepare_model_for_kbit_training(load(base, "nf4", torch.bfloat16), **options)
        theirs = peft.prepare_model_for_kbit_training(load(base, "nf4", torch.bfloat16), **options)
        assert {n: (p.dtype, p.requires_grad) for n, p in ours.named_parameters()} == {
            n: (p.dtype, p.requires_grad) for n, p in theirs.named_parameters()
        }
        assert ours.is_gradient_checkpointing == theirs.is_gradient_checkpointing
        grads = [m.get_input_embeddings()(IDS).requires_grad for m in (ours, theirs)]
        assert grads[0] == grads[1]


def test_the_references_qlora_adapter_gives_the_same(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(load(base, "nf4"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = graftlet.PeftModel.from_pretrained(load(base, "nf4"), tmp_path)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=0, atol=1e-5)
    assert ours.get_nb_trainable_parameters()[1] == theirs.get_nb_trainable_parameters()[1]


class InPlace(nn.Module):
    """A block that changes a view of its projection's output in place, as some attention code does."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.projection(x).unflatten(-1, (4, -1))
        parts[..., 0, :].mul_(2)
        parts[..., 1, :].add_(1)
        return parts.flatten(-2).square()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same dtype", "cast"])
def test_the_gradient_is_right_where_a_view_of_the_output_is_changed_in_place(dtype: torch.dtype) -> None:
    """The case for which a copy of a 4-bit layer's output is made elsewhere: what is added to it is a new tensor here."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4").to("cpu")
    model = graftlet.get_peft_model(InPlace(layer), graftlet.LoraConfig(r=4, target_modules=["projection"]))
    nn.init.normal_(model.base_model.model.projection.lora_B["default"].weight)
    host = model.base_model.model.projection
    dense = graftlet.get_peft_model(InPlace(nn.Linear(64, 64)), graftlet.LoraConfig(r=4, target_modules=["projection"]))
    twin = dense.base_model.model.projection
    with torch.no_grad():
        twin.base_layer.weight.copy_(host.site.read()[0])
        twin.base_layer.bias.copy_(host.base_layer.bias)
    graftlet.set_peft_model_state_dict(dense, copy.deepcopy(graftlet.get_peft_model_state_dict(model)))
    found = []
    for one in (model, dense):
        x = torch.ones(3, 64).mul(0.1).requires_grad_()
        one(x).mean().backward()
        learned = one.base_model.model.projection
        found.append([x.grad, learned.lora_A["default"].weight.grad, learned.lora_B["default"].weight.grad])
    for ours, right in zip(*found, strict=True):
        assert (ours - right).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * right.abs().max()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_recipe_trains_on_a_quantised_base(base: Path, method: str, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "sums.jsonl", tiny.rows())
    tables = tiny.recipe(base, data, tmp_path / "out", evaluation={"verify": True}, quantization={"method": method})
    result = train(check(tables), (), Console(quiet=True))
    before, after, loaded, merged = result.summary["measured"]
    assert after["validation_loss"] < before["validation_loss"]
    assert loaded["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-5)
    assert merged["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-2)
    assert result.summary["recipe"]["quantization"]["method"] == method
