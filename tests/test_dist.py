# SPDX-License-Identifier: Apache-2.0
"""What would be published: the wheel holds the package whole and nothing else, and its metadata are complete."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="pip install build twine")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pip install 'setuptools>=77'")
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def of_the_package() -> set[str]:
    """The files of the package as they are in the repository."""
    named = subprocess.run(["git", "ls-files", "src/graftlet"], cwd=ROOT, capture_output=True, text=True, check=False)
    if named.returncode:
        pytest.skip("this is no clone")
    return {line.removeprefix("src/") for line in named.stdout.splitlines()}


@pytest.mark.slow
def test_the_wheel_is_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    held = {n for n in names if ".dist-info/" not in n}
    assert of_the_package() <= held, of_the_package() - held
    assert all(n.startswith("graftlet/") for n in held)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "graftlet.cli:main" in next(
        zipfile.ZipFile(wheel).read(n).decode() for n in names if n.endswith("entry_points.txt")
    )
    for field in ("Name", "Version", "Summary", "Author", "Keywords", "Requires-Python", "Classifier"):
        assert metadata[field], field
    assert {"train", "quantised", "engines", "dev"} <= set(metadata.get_all("Provides-Extra", []))


@pytest.mark.slow
def test_the_sdist_builds_the_same(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/graftlet/py.typed"} <= names
    assert not [n for n in names if n.startswith((".venv", "runs", "dist", "benchmarks/results/cache"))]


@pytest.mark.slow
def test_the_metadata_would_be_taken(dist: Path) -> None:
    pytest.importorskip("twine", reason="pip install twine")
    words = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_citation_is_of_this_version() -> None:
    import graftlet

    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {graftlet.__version__}\n" in text
    assert f"\n## {graftlet.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
