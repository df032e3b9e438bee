# SPDX-License-Identifier: Apache-2.0
"""Names, folders and links that lead elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import graftlet
from graftlet.core.host import DEVICES
from graftlet.errors import AdapterFileError, AdapterNameError
from tests.hostile.tools import CONFIG, WEIGHTS, bounded, refused, saved
from tests.model.models import adapted, facts, llama, load, lora, same, save, silent

NAMES = {
    "empty": "", "a path": "a/b", "an absolute path": "/tmp/x", "a path up": "..", "up and away": "../../x", "here": ".",
    "backslashes": "a\\b", "a drive": "C:", "a zero": "a\0b", "a line": "a\nb", "stars": "a*", "a question": "a?",
    "enormous": "x" * 100_000, "many bytes": "ü" * 101, "emoji": "🙂" * 60, "a surrogate": "a\ud800", "a space": " ",
    "ends in a space": "a ", "begins in a space": " a", "a device": "NUL", "another device": "com1", "printer": "Lpt9",
    "the base": "__base__", "a number": 7, "nothing": None, "a list": ["a"], "bytes": b"a",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_could_be_no_folder_is_refused_with_one_that_could(name: object, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    base, model = llama(), adapted(llama(), lora())
    for subject, act in (
        (base, lambda: graftlet.get_peft_model(base, lora(), name)),  # type: ignore[arg-type]
        (base, lambda: graftlet.PeftModel.from_pretrained(base, folder, name)),  # type: ignore[arg-type]
        (model, lambda: model.add_adapter(name, lora())),
        (model, lambda: model.load_adapter(folder, name)),
        (model, lambda: model.rename_adapter("default", name)),
    ):
        before = facts(subject)
        with bounded(), silent(), pytest.raises(AdapterNameError) as raised:
            act()
        assert same(before, subject)
        assert len(str(raised.value)) < 600
    said = str(raised.value)
    if "use '" in said:
        model.add_adapter(said.rpartition("use '")[2].partition("'")[0], lora())


@pytest.mark.parametrize("name", ["weight", "keys", "forward", "0", "ünï", "lora_", "a b", "con-1"])
def test_a_name_that_could_is_one(name: str, tmp_path: Path) -> None:
    model = adapted(llama(), lora(init_lora_weights=False))
    model.add_adapter(name, lora(init_lora_weights=False))
    save(model, tmp_path)
    assert (tmp_path / name / WEIGHTS).is_file()
    assert load(llama(), tmp_path / name).peft_config["default"].r == 2


def test_devices_are_known() -> None:
    assert {"con", "nul", "com1", "lpt1"} <= DEVICES


@pytest.mark.parametrize("subfolder", ["..", "../other", "a/../../other", "/etc", "a/..", "..\\other"])
def test_a_subfolder_that_leads_out_is_refused(subfolder: str, tmp_path: Path) -> None:
    saved(tmp_path / "other")
    saved(tmp_path / "here" / "a")
    refused(tmp_path / "here", "leads out", AdapterFileError, subfolder=subfolder)
    load(llama(), tmp_path / "here", subfolder="a")


@pytest.mark.parametrize(
    "source", ["a\0b", "x" * 10_000, "./" + "y" * 5000, "/dev/null", "/dev/zero", "/proc/self/mem"]
)
def test_a_folder_that_is_none_is_refused(source: str) -> None:
    base = llama()
    with bounded(), silent(), pytest.raises(AdapterFileError):
        graftlet.PeftModel.from_pretrained(base, source, local_files_only=True)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "elsewhere"])
def test_a_link_that_leads_out_is_refused(name: str, target: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / target)
    message = refused(folder, name, AdapterFileError)
    assert "root:" not in message  # nothing of what is there is told


def test_a_link_that_the_user_made_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr("graftlet.limits.FOLLOW_LINKS", True)
    load(llama(), folder)


def test_links_inside_and_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "repo" / "snapshots" / "abc")
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("..", "..", "blobs", name))
    load(llama(), folder)
    inside = saved(tmp_path / "inside")
    (inside / WEIGHTS).rename(inside / "real")
    (inside / WEIGHTS).symlink_to("real")
    load(llama(), inside)
    (tmp_path / "link").symlink_to(inside)  # the folder itself may be named by a link
    load(llama(), tmp_path / "link")


def test_a_save_does_not_write_through_a_link(tmp_path: Path) -> None:
    """A downloaded folder may hold links to files of the user, or a link for another adapter's folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    folder = saved(tmp_path / "a")
    for name in (CONFIG, WEIGHTS, "README.md"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "mine" / "file")
    model = adapted(llama(), lora())
    save(model, folder)
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    model.add_adapter("other", lora())
    (folder / "other").symlink_to(tmp_path / "mine")
    with silent(), pytest.raises(AdapterFileError, match="is a link"):
        model.save_pretrained(folder)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, "can't find", AdapterFileError)
