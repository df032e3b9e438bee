# SPDX-License-Identifier: Apache-2.0
"""`graftlet verify`: what a directory is, by the standard library alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftlet.verify import verify
from tests.hostile.test_config_files import FIELDS, TEXTS
from tests.hostile.test_weight_files import HEADERS
from tests.hostile.tools import CONFIG, WEIGHTS, bounded, configured, rewritten, saved
from tests.model.models import adapted, llama, lora, save


def test_it_says_what_is_there(tmp_path: Path) -> None:
    save(adapted(llama(), lora(target_modules="(model.)+.*q_proj")), tmp_path, manifest=True)
    (tmp_path / "evil.py").write_text("")
    found = verify(tmp_path)
    assert found.sound, found.wrong
    assert (found.facts["method"], found.facts["tensors"], found.facts["kinds"]) == ("LORA", 6, ["F32"])
    assert any("evil.py can hold code" in note for note in found.notes)
    assert any("SHA256SUMS" in note for note in found.notes)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    saved(tmp_path)
    script = f"""
import sys
from graftlet.verify import verify
assert verify({str(tmp_path)!r}).sound
import graftlet.cli._verify
assert not {{"torch", "numpy", "safetensors", "transformers"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command(tmp_path: Path) -> None:
    saved(tmp_path)
    command = [sys.executable, "-c", "from graftlet.cli import main; main()", "verify", str(tmp_path)]
    good = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(good.stdout)["sound"] is True
    (tmp_path / WEIGHTS).write_bytes(b"")
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "it would not load" in bad.stdout
    assert WEIGHTS in bad.stdout


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_configs_that_are_none_are_found(text: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    with bounded(seconds=5):
        assert not verify(tmp_path).sound


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_found(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    with bounded(seconds=5):
        assert not verify(tmp_path).sound


@pytest.mark.parametrize(
    "name",
    [
        "r of a thousand million",
        "r of 10^30",
        "negative r",
        "r is text",
        "a pattern that multiplies",
        "a task that is none",
    ],
)
def test_absurd_values_are_found(name: str, tmp_path: Path) -> None:
    assert not verify(configured(saved(tmp_path), **FIELDS[name])).sound


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"])
@pytest.mark.parametrize("value", [7.5, {"a": 1}, [[1]], True], ids=str)
def test_fields_of_all_methods_have_their_types(name: str, value: object, tmp_path: Path) -> None:
    configured(saved(tmp_path), **{name: value})
    assert not verify(tmp_path).sound


GOLDEN = sorted(path.parent for path in (Path(__file__).parents[1] / "golden").rglob("adapter_config.json"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda f: f.name)
def test_what_the_reference_saved_is_sound(folder: Path) -> None:
    found = verify(folder)
    assert found.sound, found.wrong


def test_what_is_not_finite_is_found(tmp_path: Path) -> None:
    rewritten(saved(tmp_path), lambda t: t[sorted(t)[0]].view(-1)[0].fill_(float("nan")))
    assert "NaN or Inf" in verify(tmp_path).wrong[0]


def test_a_pickle_a_missing_file_and_no_directory_are_found(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert "no adapter_model" in verify(tmp_path).wrong[0]
    torch.save({}, tmp_path / "adapter_model.bin")
    assert "allow_pickle=True" in verify(tmp_path).wrong[0]
    (tmp_path / CONFIG).unlink()
    assert len(verify(tmp_path).wrong) == 2
    assert "no directory" in verify(tmp_path / "nowhere").wrong[0]


def test_an_edited_config_is_noted(tmp_path: Path) -> None:
    found = verify(configured(saved(tmp_path), lora_alpha=99))
    assert found.sound
    assert any("edited since" in note for note in found.notes)
