# SPDX-License-Identifier: Apache-2.0
"""A repository read without running it: what it needs and what its lore is, as pages that a person goes on with."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from graftlet.cli import main
from graftlet.errors import ConfigError
from graftlet.knowledge.survey import files
from graftlet.knowledge.survey.findings import KINDS, LORE, REQUIREMENTS
from graftlet.knowledge.survey.surveying import Survey, sealed, survey, untouched, write

ROOT = Path(__file__).parents[2]

REPOSITORY = {
    "pyproject.toml": '[project]\nrequires-python = ">=3.10"\ndependencies = ["torch>=2.6", "numpy"]\n'
    "[project.optional-dependencies]\nfast = [\"triton>=3 ; sys_platform == 'linux'\"]\n",
    "setup.cfg": "[options]\ninstall_requires =\n    attrs>=20\n[options.extras_require]\nweb = flask<3\n",
    "requirements-dev.txt": "# for us\npytest>=8  # tests\n-r other.txt\n\nruff==0.1\n",
    "setup.py": "from setuptools import setup\nraise SystemExit('run')\n"
    "setup(install_requires=['six>=1'], extras_require={'x': ['yarl']}, python_requires='>=3.9')\n",
    "src/tool/__init__.py": '"""A tool."""\n',
    "src/tool/core.py": '''"""The core: must be imported first."""
import importlib.util
import os
import warnings

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

HAVE = importlib.util.find_spec("triton") is not None

LIMIT = 100
"""Never more than this, or the device is lost."""


class Thing:
    def call(self, x):
        # workaround: the driver forgets what it
        # was told, so it is told twice
        if x > LIMIT:
            raise ValueError(f"x={x}; at most {LIMIT}. Lower it.")
        if torch.__version__ < "2.6":
            warnings.warn("old torch: slow")
        logger.warning("be careful with %s", x)
        return x  # noqa: E501

    def plain(self):
        """Gives three."""
        return int(os.environ.get("TOOL_SPEED", 3))
''',
    "tests/test_core.py": "def test_it():\n    raise ValueError('not lore: a test')\n",
    "broken.py": "def (:\n",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name, text in REPOSITORY.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def places(found: Survey, kind: str) -> set[str]:
    return {f.place for f in found.findings if f.kind == kind}


def test_requirements_of_all_kinds_are_found(repository: Path) -> None:
    found = survey(repository)
    declared = {(f.package, f.versions, f.group) for f in found.findings if f.kind == "declared"}
    assert declared == {
        ("python", ">=3.10", ""),
        ("torch", ">=2.6", ""),
        ("numpy", "", ""),
        ("triton", ">=3", "fast"),
        ("attrs", ">=20", ""),
        ("flask", "<3", "web"),
        ("pytest", ">=8", "dev"),
        ("ruff", "==0.1", "dev"),
        ("six", ">=1", ""),
        ("yarl", "", "x"),
        ("python", ">=3.9", ""),
    }
    assert places(found, "guarded") == {"src/tool/core.py:7"}
    assert places(found, "sought") == {"src/tool/core.py:11"}
    assert {(f.package, f.versions) for f in found.findings if f.kind == "checked"} == {("torch", "2.6")}


def test_lore_of_all_kinds_is_found_with_its_place(repository: Path) -> None:
    found = survey(repository)
    lore = {(f.kind, f.line, f.symbol) for f in found.findings if f.kind in LORE and f.module.startswith("tool")}
    assert lore == {
        ("documented", 1, "tool.core:"),
        ("documented", 14, "tool.core:LIMIT"),
        ("comment", 19, "tool.core:Thing.call"),
        ("limit", 22, "tool.core:Thing.call"),
        ("warning", 24, "tool.core:Thing.call"),
        ("logged", 25, "tool.core:Thing.call"),
        ("switch", 30, "tool.core:Thing.plain"),
    }
    comment = next(f for f in found.findings if f.kind == "comment")
    assert comment.text == "workaround: the driver forgets what it was told, so it is told twice"
    assert ("broken.py", "no Python of this version") in found.left_out


def test_what_is_about_a_symbol(repository: Path) -> None:
    found = survey(repository)
    assert len(found.about("tool.core:Thing")) == len(found.about("tool.core:Thing.call")) + 1
    assert {f.kind for f in found.about("tool.core:LIMIT")} == {"documented"}
    assert found.about("tool.core:Thin") == ()
    assert found.about("tool") == ()


def test_nothing_is_run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "src/tool/core.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(str(repository / "src"))
    survey(repository)
    assert "tool" not in sys.modules


# strangers' files


def test_links_lead_nowhere(repository: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.py").write_text("raise ValueError('the secret must not be told')\n")
    (repository / "out.py").symlink_to(secret / "key.py")
    (repository / "outside").symlink_to(secret)
    (repository / "round").symlink_to(repository)
    found = survey(repository)
    assert not any("secret" in f.text for f in found.findings)
    assert ("out.py", "a link") in found.left_out


def test_sizes_are_bounded(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "large.py").write_text("# must\n" * 200_000)
    assert any(name == "large.py" and "more than" in why for name, why in survey(repository).left_out)
    monkeypatch.setattr(files, "MOST_FILES", 3)
    found = survey(repository)
    assert len({f.file for f in found.findings}) <= 3
    assert any("after the first 3" in why for _, why in found.left_out)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "(" * 5000 + ")" * 5000,
        "x = " + "-" * 50_000 + "1",
        "x = " + "a." * 20_000 + "b",
        "x = " + "1 + " * 20_000 + "1",
        "\0",
        "'\\N{nothing}'",
        "if 1:\n" + "".join(" " * i + "if 1:\n" for i in range(1, 99)) + " " * 99 + "pass",
        "# " + "must " * 50_000,
        "def f():\n    '''" + "must not. " * 5000 + "'''\n",
    ],
    ids=["brackets", "signs", "dots", "sums", "null", "name", "deep", "comment", "docstring"],
)
def test_hostile_files_are_left_out_or_read(repository: Path, text: str) -> None:
    (repository / "src/tool/hostile.py").write_text(text)
    found = survey(repository)
    assert "src/tool/core.py:22" in places(found, "limit")
    assert all(len(f.text) <= 310 for f in found.findings)


@pytest.mark.parametrize(
    "text", ["[project", "[project]\ndependencies = 3", "project = 3", "[[project]]", "a" * 900_000]
)
def test_hostile_metadata_is_passed_over(repository: Path, text: str) -> None:
    (repository / "pyproject.toml").write_text(text)
    assert "torch" not in {f.package for f in survey(repository).findings if f.kind == "declared"}


def test_no_folder_no_survey(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        survey(tmp_path / "nothing")


# pages


@pytest.mark.parametrize("form", ["markdown", "mediawiki"])
def test_pages_have_all_that_was_found(repository: Path, tmp_path: Path, form: str) -> None:
    found, out = survey(repository), tmp_path / "out"
    done = write(found, out, form)
    text = {f.name: f.read_text() for f in out.iterdir()}
    assert set(done.written) == set(text)
    whole = "".join(text.values())
    assert all(f.place in whole for f in found.findings)
    index = next(t for name, t in text.items() if name.startswith("index"))
    assert all(page.name in index for page in found.pages)
    assert {page.kind for page in found.pages} == {"environment", "heuristic"}


def test_markup_in_what_was_found_is_shown_as_it_is(repository: Path, tmp_path: Path) -> None:
    (repository / "src/tool/core.py").write_text("raise ValueError('<script>x</script> [[a]] must *not*')\n")
    found = survey(repository)
    write(found, tmp_path / "a", "markdown")
    write(found, tmp_path / "b", "mediawiki")
    assert "<script>" not in "".join(f.read_text() for f in (tmp_path / "a").iterdir()).replace(r"\<script", "")
    wiki = (tmp_path / "b" / "heuristic-tool-core.mediawiki").read_text()
    assert "<script>" not in wiki
    assert re.search(r"<nowiki>[^\n]*\[\[a\]\][^\n]*</nowiki>", wiki)


def test_edited_pages_are_kept_unless_asked(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(survey(repository), out)
    assert write(survey(repository), out).written == ()
    page, own = out / "heuristic-tool-core.md", out / "environment-fast.md"
    page.write_text(page.read_text().replace("To be written.", "Tell it twice."))
    own.write_text("a page of my own")
    with (repository / "src/tool/core.py").open("a") as file:
        file.write("raise ValueError('one more limit')\n")
    (repository / "pyproject.toml").write_text(
        "[project]\ndependencies = []\n[project.optional-dependencies]\nfast = ['x']\n"
    )
    done = write(survey(repository), out)
    assert set(done.kept) == {page.name, own.name}
    assert "Tell it twice." in page.read_text()
    assert own.read_text() == "a page of my own"
    assert "index.md" in done.written
    assert page.name in write(survey(repository), out, overwrite=True).written
    assert "one more limit" in page.read_text()


def test_links_in_the_folder_are_not_written_through(repository: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.md"
    out.mkdir()
    other.write_text("mine")
    (out / "index.md").symlink_to(other)
    assert "index.md" in write(survey(repository), out, overwrite=True).kept
    assert other.read_text() == "mine"


def test_a_seal_tells_an_edited_page() -> None:
    assert untouched(sealed("text\n"))
    assert not untouched(sealed("text\n").replace("text", "texts"))
    assert not untouched("text\n")


def test_an_unknown_format_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="markdown, mediawiki"):
        write(survey(repository), tmp_path / "out", "html")
    assert not (tmp_path / "out").exists()


def test_the_command(repository: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["graftlet", "survey", str(repository), *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    facts = json.loads(told("--json"))
    assert {f["kind"] for f in facts["findings"]} == set(KINDS)
    assert "pages written" in told("--out", str(tmp_path / "out"))
    assert "0 pages written" in told("--out", str(tmp_path / "out"))


# this project


@pytest.fixture(scope="module")
def ours() -> Survey:
    return survey(ROOT)


def test_here_every_requirement_is_found(ours: Survey) -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0].partition("\ndependencies")[2]
    for package in re.findall(r'^  "([\w-]+)', text, flags=re.MULTILINE):
        assert any(f.package == package for f in ours.findings if f.kind in REQUIREMENTS), package


def test_here_every_error_and_warning_with_words_is_found(ours: Survey) -> None:
    """By another way: lines that begin a `raise X("...` or a `warn(X, "...` of one piece."""
    found = {f.place for f in ours.findings if f.kind in ("limit", "warning")}
    for path in sorted((ROOT / "src" / "graftlet").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*(raise \w+\(f?\"[^\\]|warn\(\w+, f?\")", line):
                assert f"{path.relative_to(ROOT).as_posix()}:{number}" in found, line


def test_here_every_page_of_the_data_is_found(ours: Survey) -> None:
    """Each page of what is known names symbols as its evidence: something must have been found there, mostly at the symbol."""
    if importlib.util.find_spec("graftlet.knowledge.book") is None:
        pytest.skip("there is no data yet")
    book = importlib.import_module("graftlet.knowledge.book")
    pages = [p for p in book.pages().values() if p.kind in ("environment", "heuristic", "code") and p.evidence]
    modules = {name: any(ours.about(e.partition(":")[0]) for e in p.evidence) for p in pages for name in [p.name]}
    assert len(pages) > 30
    assert all(modules.values()), [name for name, there in modules.items() if not there]
    exact = [any(ours.about(e) for e in p.evidence) for p in pages]
    assert sum(exact) >= 0.8 * len(exact), [p.name for p, there in zip(pages, exact, strict=True) if not there]


def test_symbols_are_where_they_are_said_to_be(ours: Survey) -> None:
    for finding in ours.findings[::25]:
        if ":" in finding.symbol and (name := finding.symbol.partition(":")[2]):
            tree = ast.parse((ROOT / finding.file).read_text())
            assert any(name.split(".")[0] in ast.unparse(node) for node in tree.body), finding
