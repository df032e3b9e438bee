# SPDX-License-Identifier: Apache-2.0
"""`graftlet export`, from a trained adapter to what each engine loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graftlet import HRAConfig, PeftModel, get_peft_model
from graftlet.testing.benches import perturb

from .test_cli import graftlet, trained  # noqa: F401 (fixtures)


def test_export_to_vllm(graftlet, trained: Path, tmp_path: Path, base: Path) -> None:  # noqa: F811
    out = tmp_path / "served"
    status, told, _ = graftlet("export", trained, out, "--to", "vllm")
    assert status == 0
    assert "LoRA of rank 4" in told
    assert f"--lora-modules served={out}" in told.replace("\n", "")
    ids = torch.tensor([[3, 4, 5]])
    one, other = (PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), p) for p in (trained, out))
    torch.testing.assert_close(one.eval()(ids).logits, other.eval()(ids).logits)
    status, _, said = graftlet("export", trained, out, "--to", "vllm")
    assert (status, "--overwrite" in said) == (1, True)
    assert graftlet("export", trained, out, "--to", "vllm", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("gguf-lora", {"adapter.gguf"}),
        ("mlx", {"adapters.safetensors", "adapter_config.json"}),
        ("merged", {"config.json", "model.safetensors", "tokenizer.json"}),
    ],
)
def test_export_elsewhere(graftlet, trained: Path, tmp_path: Path, to: str, files: set[str]) -> None:  # noqa: F811
    assert graftlet("export", trained, tmp_path / "out", "--to", to)[0] == 0
    assert files <= {p.name for p in (tmp_path / "out").iterdir()}


def test_export_converts_and_tells_what_is_lost(graftlet, base: Path, tmp_path: Path) -> None:  # noqa: F811
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), HRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    perturb(model)
    model.save_pretrained(tmp_path / "hra")
    status, told, _ = graftlet("export", tmp_path / "hra", tmp_path / "out", "--to", "vllm", "--rank", 2)
    assert status == 0
    assert "%" in told
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    status, told, _ = graftlet("export", tmp_path / "hra", tmp_path / "all", "--to", "mlx")
    assert (status, "it is HRA, not LoRA: converted" in told) == (0, True)


def test_export_refuses_in_one_line(graftlet, trained: Path, tmp_path: Path) -> None:  # noqa: F811
    for words, said in (
        (("--to", "vlm"), "did you mean 'vllm'"),
        (("--to", "vllm", "--rank", 2, "--energy", 0.5), "do not go together"),
        (("--to", "diffusers"), "which part of the pipeline"),
    ):
        status, _, told = graftlet("export", trained, tmp_path / "out", *words)
        assert (status, said in told) == (1, True), told
        assert not (tmp_path / "out").exists()
