# SPDX-License-Identifier: Apache-2.0
"""Merging on disk, shard by shard: the same files as from memory, in little memory, and it goes on where it was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftlet
from graftlet.errors import AdapterFileError, MergeError, UnsupportedOptionError
from graftlet.model.shards import Merge, skeleton_of
from graftlet.testing.benches import perturb

from .models import gpt2, llama, load, lora, save

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: lora(r=2, target_modules=LINEAR),
    "dora": lambda: lora(r=2, target_modules=LINEAR, use_dora=True),
    "hra": lambda: graftlet.HRAConfig(r=2, target_modules=LINEAR),
    "ia3": lambda: graftlet.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": lambda: graftlet.LoHaConfig(r=2, target_modules=LINEAR),
    "vera": lambda: graftlet.VeraConfig(r=2, target_modules=LINEAR),
    "vera-seeded": lambda: graftlet.VeraConfig(r=2, target_modules=LINEAR, save_projection=False),
    "pvera": lambda: graftlet.PveraConfig(r=2, target_modules=LINEAR),
    "randlora": lambda: graftlet.RandLoraConfig(r=2, target_modules=LINEAR),
    "vblora": lambda: graftlet.VBLoRAConfig(r=2, num_vectors=8, vector_length=2, topk=2, target_modules=["q_proj"]),
    "tinylora": lambda: graftlet.TinyLoraConfig(r=2, target_modules=LINEAR),
    "fourierft": lambda: graftlet.FourierFTConfig(n_frequency=9, target_modules=LINEAR),
    "waveft": lambda: graftlet.WaveFTConfig(n_frequency=9, target_modules=LINEAR),
    "osf": lambda: graftlet.OSFConfig(target_modules=LINEAR),
    "pissa": lambda: lora(r=2, target_modules=LINEAR, init_lora_weights="pissa"),
    "olora": lambda: lora(r=2, target_modules=LINEAR, init_lora_weights="olora"),
    "embeddings": lambda: lora(r=2, target_modules=["embed_tokens", "lm_head"]),
    "head": lambda: lora(r=2, modules_to_save=["lm_head"]),
    "norms": lambda: graftlet.LNTuningConfig(target_modules=["input_layernorm"]),
}


def prepared(folder: Path, model: Any, config: Any, dtype: torch.dtype = torch.float32, size: str = "1KB") -> Path:
    """A base in several files, and an adapter on it."""
    model.to(dtype).save_pretrained(folder / "base", max_shard_size=size)
    made = graftlet.get_peft_model(model, config).eval()
    perturb(made, by=0.1)
    save(made, folder / "adapter")
    return folder


def from_memory(folder: Path, dtype: torch.dtype, size: str) -> dict[str, Any]:
    base = skeleton_of(folder / "base").__class__.from_pretrained(folder / "base", dtype=dtype)
    merged = load(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "memory", max_shard_size=size)
    return contents(folder / "memory")


def contents(folder: Path) -> dict[str, Any]:
    """All files: settings as they are, tensors by name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    return found


def equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        if name.endswith(".safetensors"):
            assert {k: t.dtype for k, t in ours[name].items()} == {k: t.dtype for k, t in content.items()}
            assert all(ours[name][k].equal(t) for k, t in content.items()), name
        else:
            assert ours[name] == content, name


@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [
        *((kind, torch.bfloat16, "1KB") for kind in CONFIGS),
        *((kind, torch.float32, "1GB") for kind in ("lora", "hra", "norms")),
    ],
)
def test_the_files_are_those_of_a_merge_in_memory(kind: str, dtype: torch.dtype, size: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), CONFIGS[kind](), dtype)
    Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), size).run()
    equal(contents(folder / "out"), from_memory(folder, dtype, size))
    assert not (folder / ".out.merging").exists()


def test_transposed_layers_tied_heads_and_another_dtype(tmp_path: Path) -> None:
    folder = prepared(tmp_path, gpt2(), lora(r=2, target_modules=["c_attn", "c_fc"]))
    skeleton = skeleton_of(folder / "base", torch.float16)
    Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton, "1KB").run()
    equal(contents(folder / "out"), from_memory(folder, torch.float16, "1KB"))


TIED: dict[str, dict[str, Any]] = {
    "input": {"target_modules": ["wte"]},
    "output": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["wte", "lm_head"]},
    "both alike": {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True},
    "a copy": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "copies alike": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head", "wte"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore::graftlet.errors.TieWarning")
@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("size", ["1KB", "1GB"])
def test_a_weight_that_layers_share_is_written_as_a_merge_in_memory_would(kind: str, size: str, tmp_path: Path) -> None:
    """Once where both sides come out the same, else each by itself, and the settings say so."""
    folder = prepared(tmp_path, gpt2(), lora(r=2, **TIED[kind]))
    Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), size).run()
    equal(contents(folder / "out"), from_memory(folder, torch.float32, size))
    told = json.loads((folder / "out" / "config.json").read_text())
    assert told.get("tie_word_embeddings", True) == ("alike" in kind)


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2))
    made: list[str] = []

    def merge() -> Merge:
        found = Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), "1KB")
        whole = found.merged

        def counted(key: str) -> Any:
            made.append(key)
            if len(made) == 9:
                raise KeyboardInterrupt
            return whole(key)

        monkeypatch.setattr(found, "merged", counted)
        return found

    with pytest.raises(KeyboardInterrupt):
        merge().run()
    assert not (folder / "out").exists()
    merge().run()
    total = len(from_memory(folder, torch.float32, "1GB")["model.safetensors"])
    assert total <= len(made) < total + 9  # the shard that was cut off is done again, the finished ones are not
    made.clear()
    (folder / "adapter/adapter_model.safetensors").unlink()
    other = graftlet.get_peft_model(llama(), lora(r=2)).eval()
    perturb(other, seed=9)
    save(other, folder / "adapter")
    with pytest.raises(KeyboardInterrupt):
        merge().run()
    assert (folder / ".out.merging").exists()
    made.clear()
    merge_again = Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), "1GB")
    merge_again.run()  # another size: what was begun is of no use
    equal(contents(folder / "out"), from_memory(folder, torch.float32, "1GB"))


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2, target_modules=LINEAR))
    merge = Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), "1KB")
    merge.run()
    assert all(t.is_meta for t in merge.skeleton.state_dict().values())


PEAK = """
import resource, sys
from pathlib import Path
from graftlet.model.shards import Merge, skeleton_of
folder = Path(sys.argv[1])
merge = Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), "8MB")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is in kilobytes on Linux alone")
def test_the_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    folder = prepared(tmp_path, model, graftlet.VeraConfig(r=2, target_modules=LINEAR), size="8MB")
    whole = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
    assert whole > 90 * 2**20
    told = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    assert int(told.stdout.split()[-1]) * 2**10 < 4 * 8 * 2**20
    assert sum(p.stat().st_size for p in (folder / "out").glob("*.safetensors")) == pytest.approx(whole, rel=1e-3)


def test_what_cannot_be_merged_so_says_why(tmp_path: Path) -> None:
    for name, config, error, why in (
        (
            "adamss",
            graftlet.AdamssConfig(r=2, target_modules=["q_proj"]),
            UnsupportedOptionError,
            "looks at the weights",
        ),
        (
            "frod",
            graftlet.FrodConfig(target_modules=["q_proj"]),
            UnsupportedOptionError,
            "all layers' weights together",
        ),
        (
            "tokens",
            lora(r=2, target_modules=LINEAR, trainable_token_indices=[1]),
            UnsupportedOptionError,
            "replaces tokens",
        ),
        ("lily", graftlet.LilyConfig(r=2, target_modules=["q_proj"]), MergeError, "cannot be merged"),
    ):
        folder = prepared(tmp_path / name, llama(), config)
        with pytest.raises(error, match=why):
            Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"))
    folder = prepared(tmp_path / "other", llama(), lora(r=2))
    wider = llama(hidden_size=16)
    wider.save_pretrained(folder / "wider")
    with pytest.raises(AdapterFileError, match="shape"):
        Merge(folder / "wider", str(folder / "adapter"), folder / "out", skeleton_of(folder / "wider"))
