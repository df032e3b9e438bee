# SPDX-License-Identifier: Apache-2.0
"""The pages in a real browser without a network: every chart is drawn, in light and dark."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from graftlet.train.runs import read_runs, runs_page

from .test_cli import trained  # noqa: F401 (a fixture)
from .test_comforts import other  # noqa: F401 (a fixture)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="apt-get install chromium"),
]


def colours(page: Path, folder: Path, dark: bool) -> set[tuple[int, int, int]]:
    """The colours of a page's picture, in steps of a sixteenth."""
    browser = next(found for name in BROWSERS if (found := shutil.which(name)))
    picture = folder / f"{page.stem}-{dark}.png"
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,2600"]
    words += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    done = subprocess.run(
        [*words, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=300, check=False
    )
    assert picture.is_file(), done.stderr[-1000:]
    pixels = (imread(picture)[..., :3] * 15.99).astype(int).reshape(-1, 3)
    return set(map(tuple, pixels))


def near(found: set[tuple[int, int, int]], colour: str) -> bool:
    """Whether a colour, as CSS has it, is among them."""
    wanted = [int(colour[i : i + 2], 16) // 16 for i in (1, 3, 5)]
    return any(all(abs(a - b) <= 1 for a, b in zip(one, wanted, strict=True)) for one in found)


def test_a_report_is_drawn(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    for dark, paper, line in ((False, "#fcfcfd", "#0f766e"), (True, "#111416", "#5eead4")):
        found = colours(trained / "report.html", tmp_path, dark)
        assert near(found, paper)
        assert near(found, line)  # the curve of the training loss
        assert near(found, "#fde725")  # the largest value of a heat map


def test_a_comparison_is_drawn(trained: Path, other: Path, tmp_path: Path) -> None:  # noqa: F811
    page = tmp_path / "compare.html"
    page.write_text(runs_page(read_runs([trained, other])), encoding="utf-8")
    found = colours(page, tmp_path, False)
    assert near(found, "#463480")  # the first run
    assert near(found, "#a0da39")  # the last
