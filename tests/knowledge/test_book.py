# SPDX-License-Identifier: Apache-2.0
"""The pages hang together: names, links both ways, evidence that is there, figures that were measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from graftlet.errors import ConfigError
from graftlet.knowledge import book
from graftlet.knowledge.__main__ import measured
from graftlet.knowledge.environments import PAGES as ENVIRONMENTS
from graftlet.knowledge.heuristics import MEASURED, Heuristic
from graftlet.knowledge.page import KINDS, Page, locate
from graftlet.registry import entries

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
pages = pytest.mark.parametrize("page", book.pages().values(), ids=lambda p: p.name)


def test_there_are_pages_of_every_kind() -> None:
    assert {page.kind for page in book.pages().values()} == set(KINDS)
    assert len(book.of_kind("heuristic")) >= 25
    assert len(ENVIRONMENTS) >= 5


@pages
def test_links_go_both_ways(page: Page) -> None:
    assert book.linked(page) or "Never" in page.text, "nothing leads here"
    for other in book.linked(page):
        assert page in book.linked(other)


@pages
def test_evidence_is_there(page: Page) -> None:
    for symbol in page.evidence:
        place = locate(symbol)
        line = (ROOT / "src" / place.file).read_text().splitlines()[place.line - 1]
        assert symbol.rpartition(":")[2].rpartition(".")[2] in line


@pages
def test_a_page_is_written(page: Page) -> None:
    text = book.plain(page)
    assert text.startswith(f"# {page.title}\n")
    assert all(heading in text for heading in page.sections())


def test_evidence_that_is_gone_is_told() -> None:
    assert locate("graftlet.errors:warn").file == "graftlet/errors.py"
    with pytest.raises(ConfigError, match="defines no 'wran'"):
        locate("graftlet.errors:wran")
    with pytest.raises(ConfigError, match="no module 'graftlet.eros'"):
        locate("graftlet.eros:warn")


def test_every_family_has_a_page_and_every_page_a_family() -> None:
    assert {page.name for page in book.of_kind("principle")} == {entry.family for entry in entries()}


@pytest.mark.parametrize("page", book.of_kind("workflow"), ids=lambda p: p.name)
def test_a_workflow_is_a_file(page: Page) -> None:
    assert (ROOT / "docs" / getattr(page, "source")).is_file()  # noqa: B009


@pytest.mark.parametrize("page", book.of_kind("heuristic"), ids=lambda p: p.name)
def test_a_heuristic_has_measured_effects(page: Page) -> None:
    assert isinstance(page, Heuristic)
    assert page.effects
    assert page.text
    for effect in page.effects:
        assert effect.figures, effect.text
    assert json.loads(MEASURED.read_text())[page.name]


def test_what_was_measured_is_up_to_date() -> None:
    assert MEASURED.read_text() == measured(RESULTS), "run `python -m graftlet.knowledge`"


@pytest.mark.slow
def test_what_an_environment_is_for_is_there() -> None:
    """Names of other packages too, where those are installed."""
    for use in sorted({use for e in ENVIRONMENTS for f in e.features for use in f.uses}):
        module, _, name = use.partition(":")
        if use.startswith("graftlet."):
            assert locate(use)
        elif importlib.util.find_spec(module.partition(".")[0]) is not None:
            found = importlib.import_module(module)
            assert not name or hasattr(found, name), use
