# SPDX-License-Identifier: Apache-2.0
"""The command line, from a recipe to a merged model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graftlet import AutoPeftModelForCausalLM, __version__
from graftlet.cli import main
from graftlet.core.host import hosts
from graftlet.core.layer import AdaptedLayer

from ..train import tiny

RECIPE = """
output = "{output}"
[model]
source = "{base}"
dtype = "float32"
device = "cpu"
threads = 1
[adapter]
r = 4
[data]
source = "sums.jsonl"
prompt = "{{text}}?"
completion = "{{label}}"
system = "Odd or even"
validation = 4
[training]
max_steps = 4
learning_rate = 1e-2
batch_size = 4
"""


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.write_jsonl(folder / "sums.jsonl", tiny.rows())
    (folder / "r.toml").write_text(RECIPE.format(output=folder / "out", base=base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["graftlet", "train", str(folder / "r.toml"), "max_steps=6"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return folder / "out"


@pytest.fixture
def graftlet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graftlet", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capfd.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


def test_train_writes_what_it_says(trained: Path) -> None:
    assert {"adapter_model.safetensors", "report.html", "summary.json"} <= {p.name for p in trained.iterdir()}
    assert json.loads((trained / "summary.json").read_text())["training"]["steps"] == 6


def test_train_tells_its_progress_in_plain_lines(graftlet, trained: Path) -> None:
    status, out, _ = graftlet(
        "train", trained.parent / "r.toml", "overwrite=true", f"output={trained.parent / 'again'}"
    )
    assert status == 0
    lines = out.splitlines()
    assert "data: 48 rows, 0 filtered out, 0 doubles left out" in lines
    assert any(line.startswith("after training: validation loss") for line in lines)
    assert not any("it/s" in line for line in lines)
    assert "\x1b" not in out


def test_generate(graftlet, trained: Path) -> None:
    status, out, _ = graftlet("generate", trained, "3 and 8", "--max-new-tokens", 5)
    assert status == 0
    model = AutoPeftModelForCausalLM.from_pretrained(str(trained)).eval()
    tokenizer = tiny.tokenizer()
    asked = "<|system|>Odd or even<|end|>\n<|user|>3 and 8?<|end|>\n<|assistant|>"
    ids = torch.tensor([tokenizer(asked)["input_ids"]])
    told = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert out.strip() == tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_generate_without_the_adapter_and_from_a_file(graftlet, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    _, with_adapter, _ = graftlet("generate", trained, "-f", tmp_path / "prompts.txt", "--max-new-tokens", 4)
    _, without, _ = graftlet("generate", trained, "-f", tmp_path / "prompts.txt", "--max-new-tokens", 4, "--no-adapter")
    assert [line for line in with_adapter.splitlines() if line.startswith("»")] == ["» a", "» b"]
    assert with_adapter != without


def test_generate_with_a_temperature_is_repeatable(graftlet, trained: Path) -> None:
    told = [
        graftlet("generate", trained, "a", "--temperature", 1, "--max-new-tokens", 8, "--seed", s)[1] for s in (1, 1, 2)
    ]
    assert told[0] == told[1] != told[2]


def test_merge(graftlet, trained: Path, tmp_path: Path) -> None:
    status, out, _ = graftlet("merge", trained, tmp_path / "merged")
    assert status == 0
    assert "float32" in out
    assert "model.safetensors: 1 of 1" in out  # and the whole model was not built
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(trained)).eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert graftlet("merge", trained, tmp_path / "merged")[0] == 1
    assert graftlet("merge", trained, tmp_path / "merged", "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_combine(graftlet, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert graftlet("train", trained.parent / "r.toml", f"output={other}", "seed=3")[0] == 0
    status, out, err = graftlet("combine", trained, other, "--weights", "0.5,-0.25", "--out", tmp_path / "sum")
    assert not err
    assert status == 0
    assert "0.5 × " in out
    assert "ranks 8 to 8" in out
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "sum")).eval()
    model.load_adapter(str(trained), "a")
    model.load_adapter(str(other), "b")
    for _, layer in adapted_layers(model):
        one, two, whole = (layer.methods[n].delta(layer.view(n)) for n in ("a", "b", "default"))
        torch.testing.assert_close(whole, 0.5 * one - 0.25 * two, rtol=0, atol=1e-5)
    status, out, _ = graftlet(
        "combine", trained, other, "--search", "--recipe", trained.parent / "r.toml", "--out", tmp_path / "best"
    )
    assert status == 0, err
    losses = [float(line.split()[-1]) for line in out.splitlines() if "held-out loss" in line]
    chosen = next(line for line in out.splitlines() if " × " in line)
    assert min(losses) == next(
        float(line.split()[-1])
        for line in out.splitlines()
        if line.startswith(f"weights {', '.join(w.split(' × ')[0] for w in chosen.split(' + '))}:")
    )
    for words, said in (
        (("--weights", "1"), "1 numbers for 2 adapters"),
        (("--weights", "a,b"), "numbers with commas"),
        (("--search",), "give --recipe"),
        (("--kind", "tie"), "did you mean"),
    ):
        status, _, err = graftlet("combine", trained, other, *words, "--out", tmp_path / "none")
        assert status == 1
        assert said in err


def test_combine_by_a_recipe(graftlet, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert graftlet("train", trained.parent / "r.toml", f"output={other}", "seed=3")[0] == 0
    file = tmp_path / "mix.toml"
    text = f"""output = "{tmp_path}/sum"
kind = "svd"
rank = 2
[[adapters]]
source = "{trained}"
weight = 0.5
[[adapters]]
source = "other"
weight = -0.25
[evaluation]
recipe = "{trained.parent}/r.toml"
"""
    file.write_text(text)
    status, out, err = graftlet("combine", file)
    assert not err
    assert status == 0
    assert "0.5 × " in out
    assert "-0.25 × " in out
    assert "ranks 2 to 2" in out
    status, out, _ = graftlet("combine", file, "rank=3", f"output={tmp_path}/three")
    assert status == 0
    assert "ranks 3 to 3" in out
    assert json.loads((tmp_path / "three" / "adapter_config.json").read_text())["r"] == 3
    status, out, _ = graftlet("combine", file, "--search", "--out", tmp_path / "best")
    assert status == 0
    assert "held-out loss" in out
    for old, new, said in (
        (
            "weight = -0.25",
            "weigth = -0.25",
            f"{file}:9: adapters.1.weigth: there is no such key, did you mean 'weight'",
        ),
        ('kind = "svd"', 'kind = "svt"', "did you mean 'svd'"),
        ("rank = 2", "rank = 0", f"{file}:3: rank = 0"),
        ("rank = 2", "rank = 2\nenergy = 0.5", "rank and energy"),
        ("weight = 0.5\n", "", "a weight for each of them, or for none"),
        ('r.toml"\n', 'r.toml"\nsearch = true\n', "leave them out"),
        ("[[adapters]]", "[[adapter]]", "did you mean 'adapters'"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        status, _, err = graftlet("combine", file, "--out", tmp_path / "none")
        assert (status, said in err) == (1, True), err
    status, _, err = graftlet("combine", file, "--rank", 3)
    assert status == 1
    assert "key=value" in err
    status, _, err = graftlet("combine", trained, other)
    assert status == 1
    assert "--out is missing" in err
    assert not (tmp_path / "none").exists()


def adapted_layers(model):
    return [(path, host) for path, host in hosts(model) if isinstance(host, AdaptedLayer)]


def test_a_base_that_moved(graftlet, trained: Path, base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("summary.json", "checkpoints"))
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    status, _, err = graftlet("generate", moved, "a")
    assert status == 1
    assert "'/gone/base' is not there; say where it is with --base" in err
    assert graftlet("generate", moved, "a", "--base", base, "--max-new-tokens", 2)[0] == 0


def test_inspect(graftlet, trained: Path, tmp_path: Path) -> None:
    status, out, _ = graftlet("inspect", trained)
    assert status == 0
    assert "LORA" in out
    assert "model.layers.1.self_attn.v_proj" in out
    _, out, _ = graftlet("inspect", trained, "--json", "--html", tmp_path / "page.html")
    facts = json.loads(out)
    assert facts["method"] == "LORA"
    assert len(facts["layers"]) == 4
    assert "<picture>" in (tmp_path / "page.html").read_text()


def test_convert_and_compare(graftlet, trained: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, out, _ = graftlet("convert", trained, tmp_path / "small", "--rank", 2)
        assert status == 0
        assert "model.layers.1.self_attn.v_proj" in out
        assert "LoRA, " in out
        assert graftlet("convert", trained, tmp_path / "same", "--energy", "1.0")[0] == 0
    _, out, _ = graftlet("inspect", "--diff", trained, tmp_path / "same", "--json")
    facts = json.loads(out)
    assert all(x["cosine"] == pytest.approx(1, abs=1e-5) for x in facts["layers"])
    assert all(x["distance"] < 1e-3 * x["norm_first"] for x in facts["layers"])
    _, out, _ = graftlet("inspect", "--diff", trained, tmp_path / "small", "--json")
    lost = json.loads(out)
    assert lost["settings"]["r"] == [4, 2]
    for layer in lost["layers"]:
        assert layer["distance"] ** 2 == pytest.approx(layer["norm_first"] ** 2 - layer["norm_second"] ** 2, rel=1e-2)
    assert "apart" in graftlet("inspect", "--diff", trained, tmp_path / "small")[1]
    status, _, err = graftlet("convert", trained, tmp_path / "small", "--rank", 2)
    assert (status, "is taken" in err) == (1, True)


def test_methods(graftlet) -> None:
    _, out, _ = graftlet("methods", "--json")
    listed = {m["method"]: m for m in json.loads(out)}
    assert "lora_alpha" in listed["LORA"]["fields"]
    assert "LORA" in graftlet("methods")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "{run}/none.toml"), "cannot be read: No such file"),
        (("train", "{run}/r.toml"), "exists and is not empty. Set overwrite=true"),
        (("train", "{run}/r.toml", "epoch=1"), "there is no such key, did you mean 'epochs'"),
        (("generate", "{run}", "hi"), "can't find 'adapter_config.json'"),
        (("generate", "{run}/out"), "there is no prompt"),
        (("generate", "{run}/out", "-f", "{run}/none.txt"), "cannot be read"),
        (("merge", "{run}", "{run}/merged"), "can't find 'adapter_config.json'"),
        (("merge", "{run}/out", "{run}"), "exists and is not empty"),
        (("merge", "{run}/out", "{run}", "--overwrite"), "holds no model"),
        (("inspect", "{run}"), "can't find 'adapter_config.json'"),
        (("inspect", "--diff", "{run}", "{run}/out"), "can't find 'adapter_config.json'"),
        (("convert", "{run}/out", "{run}/x", "--rank", "2", "--energy", "0.5"), "do not go together"),
    ],
)
def test_errors_are_one_clean_line(graftlet, trained: Path, words: tuple[str, ...], said: str) -> None:
    status, _, err = graftlet(*(w.format(run=trained.parent) for w in words))
    assert status == 1
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["graftlet", "inspect", "/none", "--debug"])
    with pytest.raises(ValueError, match="adapter_config.json"):
        main()


def test_wrong_usage_is_status_two(graftlet) -> None:
    assert graftlet("train")[0] == 2
    assert graftlet("no-such-command")[0] == 2


def test_version_and_help_load_no_torch() -> None:
    code = "import sys; sys.argv = ['graftlet', '{}']\ntry:\n  import graftlet.cli; graftlet.cli.main()\nfinally:\n  "
    code += "assert not {{'torch', 'transformers'}} & set(sys.modules)"
    for flag, said in (("--version", f"graftlet {__version__}"), ("--help", "inspect")):
        done = subprocess.run([sys.executable, "-c", code.format(flag)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
