# SPDX-License-Identifier: Apache-2.0
"""A save is one transaction: killed, out of space, or beside another one, it leaves the old adapter or the new one."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import graftlet
from graftlet import files, pair
from graftlet.config import PeftConfig
from graftlet.errors import AdapterFileError, AdapterNameError, MixedFilesWarning
from graftlet.model import save as saving
from tests.hostile.tools import CONFIG, WEIGHTS, configured, saved
from tests.model.models import adapted, llama, load, logits, lora, save

CALLS = ("open", "write", "fsync", "close", "chmod", "replace", "rename", "unlink", "mkdir", "link")
"""What of the system a save uses, by its names in `os`."""
JOURNALLED = {CONFIG, WEIGHTS, pair.PICKLE, pair.SUMS}

OLD: dict[str, Any] = {"r": 2, "lora_alpha": 8}
NEW: dict[str, Any] = {"r": 3, "lora_alpha": 64}


def config_of(values: dict[str, Any]) -> PeftConfig:
    return graftlet.LoraConfig(target_modules=["q_proj"], inference_mode=True, **values)


def tensors_of(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"a": torch.full((values["r"], 4), float(values["lora_alpha"]))}


def write(folder: Path, values: dict[str, Any], **options: Any) -> None:
    saving.save_adapter(folder, config_of(values), tensors_of(values), **options)


def read(folder: Path) -> dict[str, Any]:
    """What a reader finds: the settings, after checking that the tensors are those of the settings."""
    config, stored = saving.opened(folder, None, saving.Checks(), allow_pickle=True)
    found: dict[str, Any] = {"r": config.r, "lora_alpha": config.lora_alpha}  # type: ignore[attr-defined]
    assert torch.equal(stored.read()["a"], tensors_of(found)["a"]), found
    return found


def counting(patch: pytest.MonkeyPatch, at: int = 0, act: Callable[[], None] = lambda: None) -> list[str]:
    """Patch the system so that its `at`-th call does `act` first; returns the list into which calls are written."""
    made: list[str] = []
    for name, real in [(name, getattr(os, name)) for name in CALLS]:

        def wrapped(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == at:
                act()
            return real(*args, **kwargs)

        patch.setattr(os, name, wrapped)
    return made


def calls(work: Callable[[], None]) -> int:
    """How many calls of the system some work makes."""
    with pytest.MonkeyPatch.context() as patch:
        made = counting(patch)
        work()
    return len(made)


def killed_at(n: int, work: Callable[[], None]) -> bool:
    """Do some work in a child that is killed before its n-th call of the system; whether it was."""
    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        counting(patch, n, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


KINDS = {
    "safetensors": ({}, {}),
    "with sums": ({"manifest": True}, {"manifest": True}),
    "sums before": ({"manifest": True}, {}),
    "pickle over safetensors": ({}, {"safe": False}),
    "safetensors over pickle": ({"safe": False}, {}),
    "pickle": ({"safe": False}, {"safe": False}),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_killed_at_any_call_a_save_leaves_the_old_adapter_or_the_new(kind: Any, tmp_path: Path) -> None:
    before, after = kind
    seen = set()
    for n in range(1, 200):
        folder = tmp_path / str(n)
        write(folder, OLD, **before)
        died = killed_at(n, lambda folder=folder: write(folder, NEW, **after))
        found = read(folder)
        assert found in (OLD, NEW)
        seen.add(found["r"])
        write(folder, {"r": 4, "lora_alpha": 1})  # whatever was left behind, the next save is a good one
        assert read(folder) == {"r": 4, "lora_alpha": 1}
        assert {p.name for p in folder.iterdir()} <= JOURNALLED
        if not died:
            break
    assert not died
    assert seen == {2, 3}
    assert n > 15


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twice_a_save_leaves_a_whole_adapter(tmp_path: Path) -> None:
    third = {"r": 5, "lora_alpha": 3}
    for first in range(12, 40, 2):
        for second in range(1, 40, 3):
            folder = tmp_path / f"{first}-{second}"
            write(folder, OLD)
            killed_at(first, lambda folder=folder: write(folder, NEW))
            killed_at(second, lambda folder=folder: write(folder, third))
            assert read(folder) in (OLD, NEW, third)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_an_error_at_any_call_leaves_the_old_adapter_and_is_told(code: int, tmp_path: Path) -> None:
    write(tmp_path / "count", OLD)
    total = calls(lambda: write(tmp_path / "count", NEW))

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for n in range(1, total + 1):
        folder = tmp_path / str(n)
        write(folder, OLD)
        with pytest.MonkeyPatch.context() as patch:
            counting(patch, n, fail)
            try:
                write(folder, NEW)
                done = True
            except AdapterFileError as error:
                done = False
                said = str(error)
        found = read(folder)
        assert found == NEW if done else found in (OLD, NEW)
        assert done or (os.strerror(code) in said and str(folder) in said)


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    """A real one, where one can be mounted."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mounted], capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    try:
        write(mounted, OLD)
        big = {"a": torch.zeros(2**16)}
        with pytest.raises(AdapterFileError, match="No space left"):
            saving.save_adapter(mounted, config_of(NEW), big)
        assert read(mounted) == OLD
        assert {p.name for p in mounted.iterdir()} == {CONFIG, WEIGHTS}
    finally:
        subprocess.run(["umount", "-l", mounted], check=False)


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a", OLD)
    os.chmod(tmp_path / "a", 0o500)
    try:
        if os.access(tmp_path / "a", os.W_OK):
            pytest.skip("nothing is read-only to this user")
        with pytest.raises(AdapterFileError, match="Permission denied"):
            write(tmp_path / "a", NEW)
        assert read(tmp_path / "a") == OLD
    finally:
        os.chmod(tmp_path / "a", 0o700)


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterFileError, match="could not be saved"):
        write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_text() == "mine"


SAVER = """
    import sys, time
    from pathlib import Path
    from tests.hostile.test_saving import write, read, OLD, NEW
    folder, values, until = Path(sys.argv[1]), (OLD, NEW)[int(sys.argv[2])], float(sys.argv[3])
    while time.time() < until:
        write(folder, values)
"""


@pytest.mark.slow
def test_processes_that_save_and_read_at_once_see_whole_adapters(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    until = time.time() + 12
    savers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path), str(i), str(until)])
        for i in (0, 1)
    ]
    seen = []
    while any(s.poll() is None for s in savers):
        seen.append(read(tmp_path)["r"])
    assert [s.wait() for s in savers] == [0, 0]
    assert set(seen) <= {2, 3}
    assert len(seen) > 10
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_a_config_of_another_save_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    configured(tmp_path, base_model_name_or_path="moved/elsewhere", revision="main")  # says nothing of the weights
    graftlet.PeftModel.from_pretrained(llama(), tmp_path)
    configured(tmp_path, lora_alpha=99)
    with pytest.warns(MixedFilesWarning, match="not the config that the weights"):
        graftlet.PeftModel.from_pretrained(llama(), tmp_path)
    monkeypatch.setenv("GRAFTLET_STRICT", "1")
    with pytest.raises(AdapterFileError, match="not the config that the weights"):
        graftlet.PeftModel.from_pretrained(llama(), tmp_path)


def test_a_journal_that_is_not_of_these_files_is_ignored(tmp_path: Path) -> None:
    for text in ("", "[]", '{"new": 1}', '{"new": "x", "old": "{}"}', "[" * 10_000):
        folder = saved(tmp_path / str(len(text)))
        (folder / pair.JOURNAL).write_text(text)
        assert load(llama(), folder).peft_config["default"].r == 2


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_files_have_the_permissions_of_ordinary_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save(adapted(llama(), lora()), tmp_path, manifest=True)
        (tmp_path / "ordinary").write_text("")
    finally:
        os.umask(before)
    wanted = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir() if p.is_file()} == dict.fromkeys(
        (CONFIG, WEIGHTS, "README.md", pair.SUMS, "ordinary"), wanted
    )


def test_what_is_renamed_into_place_was_flushed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), real_sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"to {Path(b).name}"), real_replace(a, b)))
    write(tmp_path, OLD)
    assert [o for o in order if o != "sync"] == [f"to {CONFIG}", f"to {WEIGHTS}"]  # the weights last
    assert order[:2] == ["sync", "sync"]
    assert order[-2:] == [f"to {WEIGHTS}", "sync"] or order[-3:-1] == [f"to {WEIGHTS}", "sync"]


def test_sums_are_compared(tmp_path: Path) -> None:
    save(adapted(llama(), lora()), tmp_path, manifest=True)
    load(llama(), tmp_path, manifest=True)
    if sum_of := _tool("sha256sum"):
        subprocess.run([sum_of, "-c", pair.SUMS], cwd=tmp_path, check=True, capture_output=True)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-2] ^= 0x40  # a bit of a number: nothing else would notice
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterFileError, match="SHA-256"):
        load(llama(), tmp_path)
    (tmp_path / pair.SUMS).unlink()
    load(llama(), tmp_path)
    with pytest.raises(AdapterFileError, match="manifest=True"):
        load(llama(), tmp_path, manifest=True)


def _tool(name: str) -> str | None:
    import shutil

    return shutil.which(name)


def test_other_readers_find_the_format_they_know(tmp_path: Path) -> None:
    import peft

    model = adapted(llama(), lora(init_lora_weights=False))
    save(model, tmp_path, manifest=True)
    assert torch.equal(logits(load(llama(), tmp_path, lib=peft)), logits(model))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert "sha256" not in (tmp_path / CONFIG).read_text()


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(tmp_path / name)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tensors_of_every_kind_survive(tmp_path: Path) -> None:
    kinds = {str(d): torch.arange(12).reshape(3, 4).to(d) for d in files._kinds().values() if "8_e" not in str(d)}
    kinds |= {"empty": torch.zeros(0, 3), "single": torch.tensor(1.5), "turned": torch.randn(3, 4).T}
    saving.save_tensors(kinds, tmp_path / WEIGHTS, {"ü": "ö"})
    for found in (load_file(tmp_path / WEIGHTS), files.read_tensors(tmp_path / WEIGHTS)):
        assert found.keys() == kinds.keys()
        assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in kinds.items())


def test_a_dtype_is_kept_by_a_save_and_a_load(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(llama().to(dtype), lora(init_lora_weights=False), graftlet)
        save(model, tmp_path / str(dtype))
        again = load(llama().to(dtype), tmp_path / str(dtype))
        assert {n: t.dtype for n, t in again.state_dict().items()} == {
            n: t.dtype for n, t in model.state_dict().items()
        }


def test_a_tensor_without_memory_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="hold nothing"):
        saving.save_adapter(tmp_path, config_of(OLD), {"a": torch.empty(2, device="meta")})
    assert not list(tmp_path.iterdir())


def test_names_that_a_disk_takes_for_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(), lora())
    for name in ("Anna", "anna"):
        model.add_adapter(name, lora())
    save(model, tmp_path / "tells them apart")
    monkeypatch.setattr(files, "_alike", lambda *_: True)
    with pytest.raises(AdapterNameError, match="'Anna' and 'anna' would be saved into the same folder"):
        model.save_pretrained(tmp_path / "does not")
    assert not (tmp_path / "does not").exists()


def test_a_card_that_cannot_be_written_costs_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n: [broken\n---\nmine")
    save(adapted(llama(), lora()), tmp_path)
    assert "mine" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 2
    load(llama(), tmp_path)


def test_stray_files_of_others_are_left_alone(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path, prefix=".tmp", delete=False) as stray:
        write(tmp_path, OLD)
    assert Path(stray.name).exists()
