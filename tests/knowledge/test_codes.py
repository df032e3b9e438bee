# SPDX-License-Identifier: Apache-2.0
"""Every error and warning has a code of its own and a page; warnings are shown once, silenced by code, errors on demand."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from graftlet import errors
from graftlet.errors import CallError, GraftletError, GraftletWarning, below, silence, warn
from graftlet.knowledge import book
from graftlet.knowledge.codes import Code
from graftlet.knowledge.source import givings

CLASSES = [GraftletError, *below(GraftletError), GraftletWarning, *below(GraftletWarning)]
OTHERS = {
    "NotImplementedError": "a base class's method that a subclass must have",
    "AttributeError": "a module's or view's `__getattr__`",
    "AssertionError": "a law that is broken",
    "ValueError": "a validator, whose caller makes a ConfigError or an AdapterFileError of it",
    "PydanticCustomError": "a ValueError of a recipe's validator, with the place of the key that is wrong",
    "TypeError": "JSON's own way to say that a value has no place in it",
    "KeyboardInterrupt": "a second Ctrl-C",
    "Exit": "the exit status of a command",
}
"""What else is raised, and why a user meets none of it but the last two."""


def codes() -> dict[str, Code]:
    return {page.of.__name__: page for page in book.pages().values() if isinstance(page, Code)}


def test_no_code_stands_for_two_meanings() -> None:
    found = [kind.code for kind in CLASSES]
    assert len(found) == len(set(found))


def test_each_class_has_a_page_under_its_code() -> None:
    pages = codes()
    assert sorted(pages) == sorted(kind.__name__ for kind in CLASSES)
    for page in pages.values():
        assert page.name == page.of.code
        assert page.text
        assert page.mend


def test_each_raise_and_each_warning_has_a_page() -> None:
    pages = codes()
    made = [(name, place) for name, place in givings() if name[:1].isupper() and name not in OTHERS]
    assert len(made) > 400
    assert [f"{place} gives {name}, which has no page" for name, place in made if name not in pages] == []


def test_each_page_is_reached() -> None:
    given = {name for name, _ in givings()}
    bases = {"GraftletError", "PeftError", "GraftletWarning", "PeftWarning"}
    assert set(codes()) - given == bases
    for name in bases:
        assert "Never" in codes()[name].text


def test_the_message_ends_with_the_code() -> None:
    assert str(CallError("no")) == "no [call-invalid]"
    with pytest.warns(errors.MergeWarning, match=r"^nothing \[merge-idle\]$"):
        warn(errors.MergeWarning, "nothing")


def given(*lines: str, environment: dict[str, str] | None = None, flags: tuple[str, ...] = ()) -> tuple[int, str]:
    code = "from graftlet import errors\nfrom graftlet.errors import warn\n" + "\n".join(lines)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    return done.returncode, done.stderr


TWICE = "for i in range(2):\n  warn(errors.MergeWarning, 'idle')\nfor i in range(2): warn(errors.MergeWarning, 'idle')"


def test_a_warning_is_shown_once() -> None:
    assert given(TWICE)[1].count("[merge-idle]") == 1
    assert given(TWICE, "warn(errors.MergeWarning, 'another')")[1].count("[merge-idle]") == 2


def test_filters_of_warnings_come_first() -> None:
    assert given("import warnings; warnings.simplefilter('always')", TWICE)[1].count("[merge-idle]") == 4
    assert given(TWICE, flags=("-W", "ignore"))[1] == ""
    assert given(TWICE, flags=("-W", "error"))[0] == 1


def test_a_warning_is_silenced_by_its_code() -> None:
    assert given(TWICE, environment={"GRAFTLET_SILENCE": "tied-weights, merge-idle"})[1] == ""
    assert "[merge-idle]" in given(TWICE, environment={"GRAFTLET_SILENCE": "tied-weights"})[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with silence("merge-idle"):
            warn(errors.MergeWarning, "idle")
            with pytest.raises(errors.TieWarning):
                warn(errors.TieWarning, "tied")
        with pytest.raises(errors.MergeWarning):
            warn(errors.MergeWarning, "idle")


def test_silencing_what_is_no_warning_is_refused() -> None:
    with pytest.raises(CallError, match="'merge-idel', did you mean 'merge-idle'"):
        silence("merge-idel")


def test_strict_makes_errors_of_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = {"GRAFTLET_STRICT": "1"}
    status, said = given(TWICE, environment=strict)
    assert status == 1
    assert "MergeWarning: idle [merge-idle]" in said
    assert given(TWICE, environment={**strict, "GRAFTLET_SILENCE": "merge-idle"}) == (0, "")
    monkeypatch.setenv("GRAFTLET_STRICT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(errors.MergeWarning):
            warn(errors.MergeWarning, "idle")
        warnings.filterwarnings("ignore", "idle", errors.MergeWarning)
        warn(errors.MergeWarning, "idle")


def test_explain_knows_the_nearest_name() -> None:
    assert book.find("[merge-rounded]").name == "merge-rounded"
    with pytest.raises(CallError, match="'merge-round', did you mean 'merge-rounded'"):
        book.find("merge-round")
