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
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

import graftlet
from graftlet.config import PeftConfig
from graftlet.errors import AdapterFileError, GraftletError, MergeError, UnsupportedOptionError
from graftlet.model.base_files import BaseFiles, fetched, skeleton_of
from graftlet.model.shards import Merge
from graftlet.registry import Entry, entries
from graftlet.testing.benches import Bench, perturb
from graftlet.testing.case import Case
from graftlet.weights.site import site_of
from tests.laws.cases import settings_of

from .models import gpt2, llama, load, logits, lora, move, save, silent

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "embeddings": lambda: lora(r=2, target_modules=["embed_tokens", "lm_head"]),
    "head": lambda: lora(r=2, modules_to_save=["lm_head"]),
    "norms": lambda: graftlet.LNTuningConfig(target_modules=["input_layernorm"]),
    "all biases": lambda: lora(r=2, target_modules=["q_proj"], bias="all"),
    "own biases": lambda: lora(r=2, target_modules=LINEAR, bias="lora_only", lora_bias=True),
    "biases of a method that decomposes": lambda: graftlet.FrodConfig(target_modules=LINEAR, bias="all"),
    "biases and a shared vector": lambda: graftlet.UniLoraConfig(target_modules=LINEAR, bias="unilora_only"),
    "tokens": lambda: lora(r=2, target_modules=LINEAR, trainable_token_indices=[7, 1, 3]),
    "tokens of two embeddings": lambda: lora(
        r=2, target_modules=LINEAR, trainable_token_indices={"embed_tokens": [7, 1], "lm_head": [2]}
    ),
    "tokens, a head and biases": lambda: lora(
        r=2, target_modules=LINEAR, trainable_token_indices=[4], modules_to_save=["lm_head"], bias="all"
    ),
    "blocks again": lambda: lora(r=2, target_modules=LINEAR, layer_replication=RANGES),
    "blocks again, all biases": lambda: lora(r=2, target_modules=LINEAR, layer_replication=RANGES, bias="all"),
    "blocks again, a new base": lambda: lora(
        r=2, target_modules=["k_proj"], layer_replication=RANGES, init_lora_weights="pissa"
    ),
    "blocks again, a new base of some": lambda: lora(
        r=2, target_modules=["k_proj"], layer_replication=RANGES, layers_to_transform=[1], init_lora_weights="pissa"
    ),
    "blocks again, tokens": lambda: lora(r=2, layer_replication=RANGES, trainable_token_indices=[7, 1, 3]),
    "blocks again, norms": lambda: lora(r=2, layer_replication=RANGES, modules_to_save=["input_layernorm"]),
}
"""Beside what is true of every method: what an adapter may bring along."""
RANGES = [[0, 2], [1, 3]]


def of_method(entry: Entry, setting: str) -> PeftConfig:
    values = settings_of(entry)[setting]
    bench = Bench("decoder", None, None, None, {"target_modules": LINEAR, "task_type": "CAUSAL_LM"})  # pyright: ignore
    case = Case(entry, setting, bench, values)
    if case.replaces:
        return case.config(target_modules=["input_layernorm"])
    return case.config(target_modules=None) if case.whole or "token_indices" in values else case.config()


BESIDE = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
}
ROUTED = {"LILY", "POLY", "SHADOW", ("LORA", "alora")}
UNMERGEABLE = BESIDE | ROUTED
"""Those that no weights could stand for: they change none, or what they add depends on the input."""

METHODS = {f"{entry.name.lower()}-{setting}": (entry, setting) for entry in entries() for setting in settings_of(entry)}


def prepared(folder: Path, model: Any, config: Any, dtype: torch.dtype = torch.float32, size: str = "1KB") -> Path:
    """A base in several files, and an adapter on it."""
    model.to(dtype).save_pretrained(folder / "base", max_shard_size=size)
    with silent():
        made = graftlet.get_peft_model(model, config).eval()
    move(made)
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


def biased() -> Any:
    return llama(attention_bias=True, mlp_bias=True, num_key_value_heads=2)


def agrees(folder: Path, dtype: torch.dtype, size: str) -> None:
    """Merged shard by shard and in memory: the same files, to the bit."""
    merging(folder, size, dtype).run()
    with silent():
        equal(contents(folder / "out"), from_memory(folder, dtype, size))
    assert not (folder / ".out.merging").exists()


def merging(folder: Path, size: str, dtype: torch.dtype | None = None) -> Merge:
    return Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base", dtype), size)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_merged_shard_by_shard_as_in_memory(name: str, tmp_path: Path) -> None:
    """None has to have the model built: what has no merged form on disk has none in memory."""
    entry, setting = METHODS[name]
    folder = prepared(tmp_path, biased(), of_method(entry, setting), torch.bfloat16)
    if not UNMERGEABLE & {entry.name, (entry.name, setting)}:
        agrees(folder, torch.bfloat16, "1KB")
        return
    with pytest.raises(MergeError, match="cannot be merged: (it|what|each|its)"):
        merging(folder, "1KB")
    with pytest.raises(GraftletError, match="cannot be merged|is for methods on layers"):
        from_memory(folder, torch.bfloat16, "1KB")


@pytest.mark.parametrize("size", ["1KB", "1GB"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_an_adapter_brings_along_too(kind: str, size: str, tmp_path: Path) -> None:
    agrees(prepared(tmp_path, biased(), CONFIGS[kind](), torch.bfloat16), torch.bfloat16, size)


@pytest.mark.parametrize("config", [lora(r=2), graftlet.FrodConfig(target_modules=LINEAR)], ids=["lora", "frod"])
def test_in_single_precision_and_one_file(config: Any, tmp_path: Path) -> None:
    agrees(prepared(tmp_path, biased(), config), torch.float32, "1GB")


def test_transposed_layers_tied_heads_and_another_dtype(tmp_path: Path) -> None:
    folder = prepared(tmp_path, gpt2(), lora(r=2, target_modules=["c_attn", "c_fc"], bias="all"))
    agrees(folder, torch.float16, "1KB")


def test_blocks_that_are_repeated_are_written_each_with_its_number(tmp_path: Path) -> None:
    config = lora(r=2, layer_replication=RANGES, init_lora_weights=False)
    folder = prepared(tmp_path, llama(tie_word_embeddings=True), config)
    agrees(folder, torch.float32, "1KB")
    assert json.loads((folder / "out/config.json").read_text())["num_hidden_layers"] == 4
    again = type(llama()).from_pretrained(folder / "out").eval()
    torch.testing.assert_close(logits(again), logits(load(llama(tie_word_embeddings=True), folder / "adapter")))


def test_a_new_head(tmp_path: Path) -> None:
    """The base's files lack it, the adapter has it."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="1KB")
    kind: Any = LlamaForSequenceClassification
    head = {"num_labels": 5}
    with silent():
        model = graftlet.get_peft_model(
            kind.from_pretrained(tmp_path / "base", **head), lora(r=2, task_type="SEQ_CLS", modules_to_save=["score"])
        )
    move(model)
    save(model, tmp_path / "adapter")
    skeleton = skeleton_of(tmp_path / "base", task="SEQ_CLS", head=head)
    Merge(tmp_path / "base", str(tmp_path / "adapter"), tmp_path / "out", skeleton, "1KB").run()
    with silent():
        merged = load(kind.from_pretrained(tmp_path / "base", **head), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "memory", max_shard_size="1KB")
    equal(contents(tmp_path / "out"), contents(tmp_path / "memory"))


def test_a_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are where downloads are kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    held = tmp_path / "models--some--base"
    llama().save_pretrained(held / "snapshots/abc")
    (held / "refs").mkdir()
    (held / "refs/main").write_text("abc")
    assert fetched("some/base") == held / "snapshots/abc"
    with pytest.raises(UnsupportedOptionError, match="some/other cannot be had"):
        fetched("some/other")


TIED: dict[str, dict[str, Any]] = {
    "input": {"target_modules": ["wte"]},
    "output": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["wte", "lm_head"]},
    "both alike": {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True},
    "a copy": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "a new base": {"target_modules": ["wte"], "init_lora_weights": "pissa"},
    "new bases": {"target_modules": ["wte", "lm_head"], "init_lora_weights": "pissa"},
    "new bases alike": {
        "target_modules": ["wte", "lm_head"],
        "init_lora_weights": "pissa",
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [7, 1, 3]},
    "tokens of both": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [7, 1], "lm_head": [2]}},
    "copies alike": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head", "wte"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore::graftlet.errors.TieWarning")
@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("size", ["1KB", "1GB"])
def test_a_weight_that_layers_share_is_written_as_a_merge_in_memory_would(kind: str, size: str, tmp_path: Path) -> None:
    """Once where both sides come out the same, else each by itself, and the settings say so."""
    folder = prepared(tmp_path, gpt2(), lora(r=2, **TIED[kind]))
    agrees(folder, torch.float32, size)
    told = json.loads((folder / "out" / "config.json").read_text())
    assert told.get("tie_word_embeddings", True) == ("alike" in kind or kind == "tokens")


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2))
    made: list[str] = []

    def merge() -> Merge:
        found = merging(folder, "1KB")
        whole = found.merged.tensor

        def counted(key: str) -> Any:
            made.append(key)
            if len(made) == 9:
                raise KeyboardInterrupt
            return whole(key)

        monkeypatch.setattr(found.merged, "tensor", counted)
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
    merging(folder, "1GB").run()  # another size: what was begun is of no use
    equal(contents(folder / "out"), from_memory(folder, torch.float32, "1GB"))


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2, target_modules=LINEAR))
    merge = merging(folder, "1KB")
    merge.run()
    assert all(t.is_meta for t in merge.skeleton.state_dict().values())


PEAK = """
import sys
from pathlib import Path
from graftlet.model.base_files import skeleton_of
from graftlet.model.shards import Merge
def held(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
for folder in map(Path, sys.argv[1:]):  # the first imports all that is needed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = held("VmRSS")
    Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton_of(folder / "base"), "8MB").run()
print(held("VmHWM") - before)
"""


LARGE: dict[str, Any] = {
    "vera": lambda: graftlet.VeraConfig(r=2, target_modules=LINEAR),
    "adamss": lambda: graftlet.AdamssConfig(r=4, target_modules=LINEAR),
    "frod": lambda: graftlet.FrodConfig(sparse_rate=0.001, target_modules=LINEAR),
    "unilora": lambda: graftlet.UniLoraConfig(target_modules=LINEAR),
    "olora": lambda: lora(r=2, target_modules=LINEAR, init_lora_weights="olora"),
    "tokens and biases": lambda: lora(r=2, target_modules=LINEAR, trainable_token_indices=[1], bias="all"),
    "blocks again": lambda: lora(r=2, target_modules=LINEAR, layer_replication=[[0, 16], [8, 24]]),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the peak, and forgets it when asked")
@pytest.mark.parametrize("kind", ["vera", *(pytest.param(k, marks=pytest.mark.slow) for k in LARGE if k != "vera")])
def test_the_memory_is_that_of_a_shard_and_the_adapter(kind: str, tmp_path: Path) -> None:
    model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    folder = prepared(tmp_path, model, LARGE[kind](), size="8MB")
    small = prepared(tmp_path / "small", llama(num_hidden_layers=24), LARGE[kind]())
    whole = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
    assert whole > 90 * 2**20
    program = [sys.executable, "-c", PEAK, str(small), str(folder)]
    told = subprocess.run(program, capture_output=True, text=True, check=True)
    adapter = (folder / "adapter/adapter_model.safetensors").stat().st_size
    assert int(told.stdout.split()[-1]) * 2**10 < 4 * (8 * 2**20 + adapter)
    written = sum(p.stat().st_size for p in (folder / "out").glob("*.safetensors"))
    assert written == pytest.approx(whole * (4 / 3 if kind == "blocks again" else 1), rel=1e-2)


def without(folder: Path) -> None:
    """As if the base had been saved by pickle."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def packed(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    kind = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**told, "quantization_config": kind}))


def renamed(folder: Path) -> None:
    """As some checkpoints are, which transformers translates as it loads them."""
    tensors = {k.replace("q_proj", "wq"): t for k, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][None].contiguous()
    save_file(tensors, folder / "model.safetensors")


def parted(folder: Path) -> None:
    """A head of its own in the files of a model whose settings say that it has none."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


BUILT = {
    parted: "model.embed_tokens.weight and lm_head.weight are one tensor, but differ in the files",
    without: "holds no safetensors files",
    packed: "is quantised, and its files hold packed numbers",
    renamed: "the base's files lack model.layers.0.self_attn.q_proj.weight",
    reshaped: "model.norm.weight in model.safetensors is",
}
"""Bases that cannot be read tensor by tensor, so that the command builds the model: it says why."""


@pytest.mark.parametrize("change", BUILT, ids=lambda change: change.__name__)
def test_a_base_that_has_to_be_built_says_why(change: Any, tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2), size="1GB")
    change(folder / "base")
    with pytest.raises(UnsupportedOptionError, match=BUILT[change]):
        merging(folder, "1KB")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2))
    gone = sorted((folder / "base").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UnsupportedOptionError, match=f"lacks {gone.name}"):
        merging(folder, "1KB")


def test_a_weight_in_a_file_is_read_and_never_written(tmp_path: Path) -> None:
    (model := llama()).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path, torch.float32)
    BaseFiles(tmp_path, skeleton, "cpu")
    site = site_of(skeleton.model.layers[1].mlp.down_proj)
    assert site is not None
    assert site.device.type == "meta"
    assert site.read()[0].equal(model.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(MergeError, match="it stands in a file"):
        site.write(torch.zeros(site.shape), None)


def test_a_module_in_several_places_has_to_be_built(tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2))
    skeleton = skeleton_of(folder / "base")
    skeleton.model.layers[1].mlp = skeleton.model.layers[0].mlp
    with pytest.raises(UnsupportedOptionError, match="a module in several places"):
        Merge(folder / "base", str(folder / "adapter"), folder / "out", skeleton)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path, llama(), lora(r=2))
    wider = llama(hidden_size=16)
    wider.save_pretrained(folder / "wider")
    with pytest.raises(AdapterFileError, match="shape"):
        Merge(folder / "wider", str(folder / "adapter"), folder / "out", skeleton_of(folder / "wider"))


def test_tensors_that_the_model_has_not_are_left_out(tmp_path: Path) -> None:
    """As in old checkpoints, and without the levels that lead to a head's model."""
    folder = prepared(tmp_path, llama(), lora(r=2), size="1GB")
    file = folder / "base/model.safetensors"
    tensors = {k.removeprefix("model."): t for k, t in load_file(file).items()}
    save_file({**tensors, "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, file, {"format": "pt"})
    agrees(folder, torch.float32, "1GB")
