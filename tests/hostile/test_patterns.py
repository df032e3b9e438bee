# SPDX-License-Identifier: Apache-2.0
"""Regexes out of a config: the same language as `re`, in bounded time."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graftlet
from graftlet import patterns
from graftlet.core.target import by_pattern
from graftlet.errors import ConfigError
from tests.hostile.tools import bounded, configured, refused, saved
from tests.model.models import llama, silent

EVIL = {
    "nested": "(a+)+b",
    "classes": r"((\w|\.)+)+!",
    "deep": "((((a+)+)+)+)+b",
    "alternatives": "(a|a)*b",
    "many": "(a|a)" * 60 + "b",
    "optional": "a?" * 80 + "a" * 80 + "b",
    "dots": "(.*)(.*)(.*)(.*)(.*)(.*)(.*)b",
    "lazy": "(a*?)*?b",
    "ahead": "(?=(a+)+b)a",
    "counted": "(a{1,60}){1,60}b",
    "empty": "((a?){1,1000}){1,1000}b",
}


@pytest.mark.parametrize("pattern", EVIL.values(), ids=EVIL)
def test_no_regex_takes_long(pattern: str) -> None:
    for text in ("a" * 30, "a" * 120, "model.layers.0.self_attn.q_proj"):
        with bounded(seconds=10), suppress(ConfigError):  # too many steps
            assert not patterns.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
@pytest.mark.parametrize("evil", ["classes", "many", "optional"])
def test_no_regex_in_a_file_takes_long(field: str, evil: str, tmp_path) -> None:
    value = {EVIL[evil]: 3} if field.endswith(("rank_pattern", "alpha_pattern")) else EVIL[evil]
    also = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    configured(saved(tmp_path), **{field: value}, **also)
    if field in ("exclude_modules", "rank_pattern", "alpha_pattern"):  # they match nothing: the adapter is as it was
        with bounded(), silent(), suppress(ConfigError):
            graftlet.PeftModel.from_pretrained(llama(), tmp_path)
    else:
        refused(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "no valid regex"),
        ("(" * 5000 + ")" * 5000, "no valid regex"),
        ("a" * 200_000, "characters"),
        (r"(a*)*\1", "cannot be matched in bounded time"),
        ("(?>a+)+(b+)+", "no valid regex|cannot be matched"),
    ],
)
def test_what_is_no_regex_or_cannot_be_bounded_is_named(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        patterns.check(pattern, "LoraConfig.target_modules")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v)_proj",
        r"(?!.*vision).*\.layers\.\d+\.(q_proj|k_proj)$",
        r"(.*\.)?(q_proj)",
        r"(?i:MODEL).*",
        r"(a)\1",
    ],
)
def test_ordinary_patterns_are_left_to_re(pattern: str) -> None:
    assert patterns.compiled(pattern) is not None


REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "{1,2}", "{2}", "{0,3}?"])
ATOMS = st.sampled_from(
    ["a", "b", ".", r"\d", r"\w", "[ab]", "[^a]", "^", "$", r"\b", r"\.", "A", r"(?<=a)", r"(?<!b)"]
)


def _grown(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map("".join),
        two.map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{1,2}", "{2}", "{0,3}?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        st.tuples(st.sampled_from(["?=", "?!", "?i:", "?s:", "?m:", "?P<n>"]), inner).map(lambda p: f"({p[0]}{p[1]})"),
    )


@settings(max_examples=400, deadline=None)
@given(st.recursive(ATOMS, _grown, max_leaves=12), st.text("abA.1\n", max_size=7))
def test_matching_by_positions_is_matching(pattern: str, text: str) -> None:
    try:
        wanted = re.fullmatch(pattern, text) is not None
    except re.error:
        return
    assert (len(text) in patterns._Positions(pattern, text).ends()) == wanted
    assert patterns.fullmatch(pattern, text) == wanted


@settings(max_examples=300, deadline=None)
@given(st.text("ab.-_", min_size=1, max_size=5), st.text("ab.", max_size=8))
def test_the_quick_way_for_names_is_the_regex(key: str, path: str) -> None:
    assert by_pattern({key: True}, path, False) == (re.fullmatch(rf"(.*\.)?({key})", path) is not None)
