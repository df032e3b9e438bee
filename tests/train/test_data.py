# SPDX-License-Identifier: Apache-2.0
"""Rows into examples and splits: formats, filters, templates, disjoint parts, and clear errors for bad files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from graftlet.errors import ConfigError, DependencyError
from graftlet.train.data import Example, load_splits
from graftlet.train.recipe import DataTable
from graftlet.train.sources import data_files, package_files

from . import tiny


def table(source: Path, **values: Any) -> DataTable:
    return DataTable.model_validate({"source": str(source), **values})


def sums(source: Path, **values: Any) -> DataTable:
    return table(source, prompt="{text}", completion="{label}", **values)


def test_parts_are_disjoint_balanced_and_repeatable(data: Path) -> None:
    rows = [*tiny.rows(), *({**r, "text": f" {r['text'].upper()} "} for r in tiny.rows(10))]
    tiny.write_jsonl(data, rows)
    wanted = sums(data, balance="label", train=20, validation=4, test=6)
    splits = load_splits(wanted, seed=1)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(p) for p in parts] == [20, 4, 6]
    assert all(set(Counter(e.group for e in p).values()) == {len(p) // 2} for p in parts)
    keys = [e.key for p in parts for e in p]
    assert len(keys) == len(set(keys))
    assert splits.facts == {"rows": 58, "filtered": 0, "doubles": 10}
    assert load_splits(wanted, seed=1) == splits
    assert load_splits(wanted, seed=2).train != splits.train


def test_a_separate_test_file_wins_over_the_same_question_in_training(data: Path, tmp_path: Path) -> None:
    held_out = tiny.write_jsonl(tmp_path / "test.jsonl", tiny.rows(5))
    splits = load_splits(sums(data, test_source=str(held_out)), seed=0)
    assert len(splits.test) == 5
    assert len(splits.train) == 43


def test_shares(data: Path) -> None:
    splits = load_splits(sums(data, test=0.25, validation=0.25), seed=0)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [27, 9, 12]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_formats_hold_the_same(form: str, data: Path, tmp_path: Path) -> None:
    rows, path = tiny.rows(6), tmp_path / f"rows.{form}"
    if form == "jsonl":
        tiny.write_jsonl(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        cut = "," if form == "csv" else "\t"
        path.write_text("\n".join(["\ufefftext" + cut + "label", *(f'"{r["text"]}"{cut}{r["label"]}' for r in rows)]))
    splits = load_splits(sums(path, shuffle=False), seed=0)
    assert [e.answer for e in splits.train] == [r["label"] for r in rows]


def test_templates_values_and_filters(tmp_path: Path) -> None:
    path = tmp_path / "sms.csv"
    path.write_text("spam,text\n0,hello you\n1,win!\n1,a very long text that is too long\n")
    splits = load_splits(
        table(
            path,
            system="Filter.",
            prompt="{text} {{spam?}}",
            completion="{spam}",
            values={"spam": {"0": "ham", "1": "spam"}},
            where=[{"column": "text", "max_chars": 12}],
            shuffle=False,
        ),
        seed=0,
    )
    assert [[m["content"] for m in e.messages] for e in splits.train] == [
        ["Filter.", "hello you {spam?}", "ham"],
        ["Filter.", "win! {spam?}", "spam"],
    ]
    assert splits.facts["filtered"] == 1


def test_chats_end_with_their_last_answer(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    splits = load_splits(table(tiny.write_jsonl(tmp_path / "c.jsonl", [{"messages": turns}])), seed=0)
    assert splits.train == [Example(tuple(turns[:2]))]


def test_chatterbot_and_bfcl(tmp_path: Path) -> None:
    yml = tmp_path / "ai.yml"
    yml.write_text("categories: [ai]\nconversations:\n- - Are you?\n  - Yes\n  - 1.0\n- - Only a question\n")
    splits = load_splits(table(yml, format="chatterbot", dedupe=False, shuffle=False), seed=0)
    assert [e.answer for e in splits.train] == ["Yes", "1.0"]

    calls = tiny.write_jsonl(
        tmp_path / "calls.json",
        [{"id": "a", "question": [[{"role": "user", "content": "Area?"}]], "function": [{"name": "area"}]}],
    )
    (tmp_path / "possible_answer").mkdir()
    gold = [{"area": {"base": [10], "unit": ["units", ""]}}]
    tiny.write_jsonl(tmp_path / "possible_answer/calls.json", [{"id": "a", "ground_truth": gold}])
    (example,) = load_splits(table(calls, format="bfcl", prompt="{functions} {prompt}"), seed=0).train
    assert example.messages[0]["content"] == '{"name": "area"} Area?'
    assert json.loads(example.answer) == {"name": "area", "arguments": {"base": 10}}
    assert example.gold == gold


@pytest.mark.parametrize(
    ("text", "values", "said"),
    [
        ("", {}, "holds no rows"),
        ("{}\n{", {}, "rows.jsonl:2: this line is no JSON"),
        ("[1]", {}, "rows.jsonl:1: a JSON object is needed"),
        ('{"txt": "a", "label": "b"}', {"prompt": "{text}"}, "data.prompt: the data has no column 'text', did you mean 'txt'"),
        ('{"a": "a"}', {"prompt": "{a"}, "is no template"),
        ('{"a": "a"}', {"prompt": "{a}", "completion": "{a}", "balance": "b"}, "data.balance: the data has no column 'b'"),
        ('{"a": "a"}', {"values": {"b": {}}}, "data.values: the data has no column 'b'"),
        ('{"a": "a"}', {"where": [{"column": "b"}]}, "data.where: the data has no column 'b'"),
        ('{"a": "a"}', {"prompt": "{a}", "completion": "{a}", "test": 2}, "data.test = 2: 2 examples are needed, and 1"),
        ('{"a": "a"}', {"where": [{"column": "a", "equals": "b"}]}, "no examples are left to train on"),
        ('{"a": "a"}', {"format": "jsnl"}, "no reader for 'jsnl'"),
        ('{"messages": "hi"}', {}, "data.messages: a list of {role, content} is needed"),
        ('{"messages": [{"role": "human", "content": "hi"}]}', {}, "role 'human'"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', {}, "no assistant answer follows a question"),
    ],
)  # fmt: skip
def test_bad_data(tmp_path: Path, text: str, values: dict[str, Any], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_splits(table(path, **values), seed=0)
    assert said in str(caught.value)


def test_a_package_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a_package" / "data"
    inside.mkdir(parents=True)
    (tmp_path / "a_package" / "__init__.py").write_text("raise RuntimeError('a package is not to be imported')")
    (inside / "rows.csv").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a-package", "a_package"):
        assert package_files(f"package:{name}:a_package/data/rows.csv") == [inside / "rows.csv"]
        assert package_files(f"package:{name}", "*.csv") == [inside / "rows.csv"]
    with pytest.raises(ConfigError, match="has no file"):
        package_files("package:a-package:a_package/data/columns.csv")


def test_sources(tmp_path: Path) -> None:
    (found,) = package_files("package:pytest:pytest/__init__.py")
    assert found.is_file()
    with pytest.raises(DependencyError, match="pip install --no-deps no-such-package"):
        package_files("package:no-such-package:a.csv")
    with pytest.raises(ConfigError, match="did you mean 'pytest/__init__.py'"):
        package_files("package:pytest:pytest/__int__.py")
    (tmp_path / "rows.csv").touch()
    assert data_files("rows.csv", tmp_path) == [tmp_path / "rows.csv"]
    assert data_files("r*.csv", tmp_path) == [tmp_path / "rows.csv"]
    assert data_files("owner/name") == []
    with pytest.raises(ConfigError, match="did you mean 'rows.csv'"):
        data_files("row.csv", tmp_path)
