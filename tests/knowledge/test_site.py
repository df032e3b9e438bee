# SPDX-License-Identifier: Apache-2.0
"""The docs that are made from the data hold together, and the check says where they do not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftlet.knowledge import book, site
from graftlet.knowledge.page import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Change a page, for a test."""

    def change(name: str, **values: Any) -> None:
        found = dict(book.pages())
        found[name] = dataclasses.replace(found[name], **values)
        book._links.cache_clear()
        monkeypatch.setattr(book, "pages", lambda: found)
        monkeypatch.setattr(site, "pages", lambda: found)

    yield change
    monkeypatch.undo()
    book._links.cache_clear()


def test_the_docs_hold_together() -> None:
    assert site.check(ROOT) == []


def test_a_link_to_no_page_is_told(changed: Any) -> None:
    changed("merge-rounded", links=("merge-into-quantized",))
    (wrong,) = site.check(ROOT)
    assert (
        "'merge-rounded' links to 'merge-into-quantized', which is no page, did you mean 'merge-into-quantised'"
        in wrong
    )


def test_evidence_that_is_gone_is_told(changed: Any) -> None:
    changed("merge-rounded", evidence=("graftlet.core.lifecycle:round_it",))
    (wrong,) = site.check(ROOT)
    assert "defines no 'round_it'" in wrong


def test_a_one_way_link_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = site.written

    def without(page: Any) -> str:
        return plain(page).replace("[Merge](../workflows/merge.md)", "Merge") if page.name == "serving" else plain(page)

    monkeypatch.setattr(site, "written", without)
    assert "workflows/merge.md links to environments/serving.md, which does not link back." in site.check(ROOT)


def test_dangling_links_and_unknown_names_in_files_are_told(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs" / "more.md").write_text("[gone](nowhere.md) and `graftlet explain no-such-code`\n")
    wrong = site.check(tmp_path)
    assert "more.md links to nowhere.md, which is not there." in wrong
    assert "more.md names no-such-code, which no page is of." in wrong


def test_links_out_of_the_docs_are_mended() -> None:
    text = "[tables](../../benchmarks/results/gpu.md), [the licence](../../LICENSE), [here](lora.md), [there](https://a.org)"
    assert site.rewritten(text, "guides/speed.md", ROOT) == (
        "[tables](../measured/gpu.md), the licence (`LICENSE`), [here](lora.md), [there](https://a.org)"
    )


def test_every_kind_has_an_index_with_all_its_pages() -> None:
    for kind in KINDS:
        text = site.index(kind)
        assert all(f"`{page.name}`" in text for page in book.of_kind(kind))
