# SPDX-License-Identifier: Apache-2.0
"""The README and the docs are true: generated tables are up to date, code runs, links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from graftlet import registry
from graftlet.knowledge.tables import filled, rows
from tests.train import tiny

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


NEEDS = {"embeddings.md": "sentence_transformers"}
"""What a page's code needs beside what the tests always have."""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which `my-base` is a tiny language model, and `my-model` one with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "my-base")
    tiny.save(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_generated_tables_are_up_to_date(page):
    text = page.read_text()
    assert filled(text) == text, f"run `python -m graftlet.knowledge` to bring {page.name} up to date"


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.name)
def test_python_blocks_run(page, workplace, monkeypatch):
    """As one module, so that its classes can be pickled; the methods that it registers are gone afterwards."""
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    list(registry.entries())
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_method_has_a_title_and_a_formula():
    for row in rows():
        assert row.title, row
        assert row.config.endswith("Config"), row
