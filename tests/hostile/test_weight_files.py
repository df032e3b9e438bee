# SPDX-License-Identifier: Apache-2.0
"""Weights from a stranger: headers that lie, tensors that do not belong, files that change while they are read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import graftlet
from graftlet import files
from graftlet.errors import AdapterFileError, KeysWarning
from graftlet.tensorfile import first_unfinite, parse_header, read_header
from tests.hostile.tools import WEIGHTS, bounded, raw, refused, rewritten, saved
from tests.model.models import adapted, facts, llama, logits, lora, same, save, silent


def entry(shape: Any = (1,), places: Any = (0, 4), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": places, **more}


FOUR = b"\0" * 4
HEADERS = {
    "empty": b"",
    "three bytes": b"abc",
    "a length alone": (8).to_bytes(8, "little"),
    "a length beyond the end": raw({"a": entry()}, FOUR, length=10**6),
    "the longest length": b"\xff" * 64,
    "not JSON": raw(b"not json at all!"),
    "a list": raw(b"[]      "),
    "nested": raw(b"[" * 100_000),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "cut": raw({"a": entry()}, b"\0" * 3),
    "added to": raw({"a": entry()}, b"\0" * 5),
    "overlapping": raw({"a": entry(), "b": entry()}, FOUR),
    "overlapping in part": raw({"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))}, b"\0" * 12),
    "a gap": raw({"a": entry(), "b": entry((1,), (8, 12))}, b"\0" * 12),
    "not at the beginning": raw({"a": entry((1,), (4, 8))}, b"\0" * 8),
    "a shape that lies": raw({"a": entry((10**9,))}, FOUR),
    "a shape that overflows": raw({"a": entry((2**62, 4), (0, 0))}),
    "a negative shape": raw({"a": entry((-1,))}, FOUR),
    "a shape of truth": raw({"a": entry((True,))}, FOUR),
    "a shape of text": raw({"a": entry("4")}, FOUR),
    "a shape of many dimensions": raw({"a": entry((1,) * 100_000)}, FOUR),
    "negative places": raw({"a": entry((1,), (-4, 0))}, FOUR),
    "places backwards": raw({"a": entry((1,), (4, 0))}, FOUR),
    "places that are none": raw({"a": entry((1,), None)}, FOUR),
    "an unknown kind": raw({"a": entry(dtype="F4")}, FOUR),
    "a kind that is a list": raw({"a": entry(dtype=["F32"])}, FOUR),
    "another field": raw({"a": entry(code="import os")}, FOUR),
    "a field less": raw({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "the same key twice": raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), FOUR),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": entry()}, FOUR),
    "metadata twice": raw(b'{"__metadata__":{},"__metadata__":{},"a":%s}' % json.dumps(entry()).encode(), FOUR),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused_and_the_file_named(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    assert len(refused(tmp_path, WEIGHTS, AdapterFileError)) < 1000


def test_a_large_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    saved(tmp_path)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)
    refused(tmp_path, "MAX_HEADER_BYTES|at most", AdapterFileError)


def test_more_numbers_than_the_config_allows_are_not_read(tmp_path: Path) -> None:
    """A sparse file of eight gigabytes, with a true header."""
    saved(tmp_path)
    header = read_header(tmp_path / WEIGHTS)
    key = sorted(header.entries)[0]
    content = raw({key: entry((2**31,), (0, 2**33))})
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(content)
        file.truncate(len(content) + 2**33)
    refused(tmp_path, "another shape", AdapterFileError)


TENSORS = {
    "missing": (lambda t: t.pop(sorted(t)[0]), "1 missing"),
    "all missing": (lambda t: t.clear(), "6 missing"),
    "unexpected": (lambda t: t.update({"evil.lora_A.weight": torch.zeros(2, 8)}), "1 not part of this adapter"),
    "misshaped": (lambda t: t.update({sorted(t)[0]: torch.zeros(3, 8)}), "another shape"),
    "transposed": (lambda t: t.update({sorted(t)[0]: torch.zeros(8, 2)}), "another shape"),
    "without dimensions": (lambda t: t.update({sorted(t)[0]: torch.zeros(())}), "another shape"),
    "empty": (lambda t: t.update({sorted(t)[0]: torch.zeros(0, 8)}), "another shape"),
    "integers": (lambda t: t.update({sorted(t)[0]: torch.zeros(2, 8, dtype=torch.int64)}), "another kind"),
    "truths": (lambda t: t.update({sorted(t)[0]: torch.zeros(2, 8, dtype=torch.bool)}), "another kind"),
    "complex": (lambda t: t.update({sorted(t)[0]: torch.zeros(2, 8, dtype=torch.complex64)}), "another kind"),
    "NaN": (lambda t: t[sorted(t)[0]].view(-1)[3].fill_(float("nan")), "NaN or Inf in 1"),
    "infinite": (lambda t: t[sorted(t)[-1]].view(-1)[0].fill_(float("-inf")), "NaN or Inf in 1"),
    "NaN in eight bits": (lambda t: t.update({sorted(t)[0]: torch.full((2, 8), float("nan")).to(torch.float8_e5m2)}), "NaN"),
    "a layer of the base": (
        lambda t: t.update({sorted(t)[0].replace("lora_A", "base_layer"): torch.zeros(8, 8)}),
        "not part",
    ),
    "a norm of the base": (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(8)}), "not part"),
    "a key of dots": (lambda t: t.update({"..": torch.zeros(1)}), "not part"),
    "a key of nothing": (lambda t: t.update({"": torch.zeros(1)}), "not part"),
    "a very long key": (lambda t: t.update({"x." * 50_000: torch.zeros(1)}), "a name of 100,000"),
    "a key that is code": (lambda t: t.update({"__class__.__init__": torch.zeros(1)}), "not part"),
}  # fmt: skip


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_belong_are_refused(change: Any, tmp_path: Path) -> None:
    message = refused(rewritten(saved(tmp_path), change[0]), change[1], AdapterFileError)
    assert len(message) < 3000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_numbers_of_another_width_are_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = logits(graftlet.PeftModel.from_pretrained(llama(), saved(tmp_path)).eval())
    rewritten(tmp_path, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert torch.allclose(logits(graftlet.PeftModel.from_pretrained(llama(), tmp_path).eval()), plain, atol=1e-2)


def test_a_lenient_load_lists_what_it_left_out(tmp_path: Path) -> None:
    def change(tensors: Any) -> None:
        tensors.pop(sorted(tensors)[0])
        tensors["evil.lora_A.weight"] = torch.zeros(2, 8)
        tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")

    rewritten(saved(tmp_path), change)
    with pytest.warns(KeysWarning, match="1 missing.*1 not part of this adapter.*evil.*NaN or Inf in 1"):
        graftlet.PeftModel.from_pretrained(llama(), tmp_path, strict=False)
    model = adapted(llama(), lora())
    with pytest.warns(KeysWarning, match="evil"):
        result = model.load_adapter(tmp_path, "other", strict=False)
    assert (len(result.missing_keys), result.unexpected_keys) == (1, ["evil.lora_A.weight"])


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS."""
    save_file({"a": torch.zeros(2**18)}, tmp_path / WEIGHTS)
    opened = files.TensorFile(tmp_path / WEIGHTS)
    os.truncate(tmp_path / WEIGHTS, opened.header.offset + 8)
    with pytest.raises(AdapterFileError, match="became shorter"):
        opened.read()


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    saved(tmp_path)
    wanted = load_file(tmp_path / WEIGHTS)
    opened = files.TensorFile(tmp_path / WEIGHTS)
    rewritten(tmp_path, lambda t: [v.zero_() for v in t.values()])
    assert all(torch.equal(v, wanted[k]) for k, v in opened.read().items())


PLACES = {
    "shira": (graftlet.ShiraConfig(r=2, target_modules=["q_proj"]), "shira_indices"),
    "unilora": (
        graftlet.UniLoraConfig(r=2, theta_d_length=30, save_indices=True, target_modules=["q_proj"]),
        "unilora_indices_A",
    ),
    "vblora": (
        graftlet.VBLoRAConfig(
            r=2, num_vectors=6, vector_length=2, topk=2, save_only_topk_weights=True, target_modules=["q_proj"]
        ),
        "topk_indices",
    ),
    "frod": (graftlet.FrodConfig(sparse_rate=0.1, target_modules=["q_proj"]), "frod_s_indices"),
}


@pytest.mark.parametrize("value", [-1, 127])
@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES)
def test_places_that_are_none_are_refused(case: Any, value: int, tmp_path: Path) -> None:
    """On a GPU an index beyond the end ends all work of the process; as a sparse matrix it reads others' memory."""
    save(adapted(llama(), case[0]), tmp_path)

    def change(tensors: Any) -> None:
        key = next(k for k in sorted(tensors) if case[1] in k)
        tensors[key].view(-1)[0] = value if tensors[key].dtype != torch.uint8 else abs(value) + 100

    rewritten(tmp_path, change)
    base = llama()
    before = facts(base)
    with silent(), pytest.raises(AdapterFileError, match="places from"):
        graftlet.PeftModel.from_pretrained(base, tmp_path)
    assert same(before, base)


class Evil:
    """Makes a file as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "content",
    [
        lambda p: {"a": Evil(p)},
        lambda p: [torch.zeros(1)],
        lambda p: {1: torch.zeros(1)},
        lambda p: torch.nn.Linear(1, 1),
    ],
    ids=["code", "a list", "numbers as keys", "a module"],
)
def test_a_pickle_runs_no_code_and_holds_tensors_alone(content: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    ran = tmp_path / "ran"
    torch.save(content(ran), tmp_path / "adapter_model.bin")
    refused(tmp_path, "allow_pickle", AdapterFileError)
    refused(tmp_path, "adapter_model.bin", AdapterFileError, allow_pickle=True)
    assert not ran.exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_with_bytes_changed_is_refused_or_holds_the_same_tensors_but_one(data: st.DataObject) -> None:
    good = raw({"a": entry((2, 2), (0, 16)), "b": entry((3,), (16, 28))}, bytes(28))
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    _parse_like_safetensors(bytes(content))


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=6),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "", 3]),
                "shape": st.lists(st.integers(-1, 4), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 40),
)
def test_any_header_is_refused_or_true(header: Any, size: int) -> None:
    _parse_like_safetensors(raw(header, bytes(size)))


def _parse_like_safetensors(content: bytes) -> None:
    """What is accepted here is accepted by safetensors, with the same tensors."""
    import io

    from safetensors import SafetensorError, deserialize

    try:
        found = parse_header(content[:8], len(content), io.BytesIO(content[8:]).read, Path("x"))
    except AdapterFileError:
        return
    try:
        theirs = dict(deserialize(content))
    except SafetensorError as error:  # it takes no empty tensors beyond an end, and names none twice
        raise AssertionError(f"{error} for {content!r}") from error
    assert {k: list(e.shape) for k, e in found.entries.items()} == {k: v["shape"] for k, v in theirs.items()}
    assert all(
        content[found.offset + e.start : found.offset + e.end] == bytes(theirs[k]["data"])
        for k, e in found.entries.items()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_what_is_not_finite_is_found_without_torch(dtype: torch.dtype, value: float | None, tmp_path: Path) -> None:
    tensor = torch.randn(50).to(dtype)
    tensor[7], tensor[8] = torch.finfo(dtype).max, torch.finfo(dtype).min
    if value is not None:
        tensor[31] = value
    save_file({"a": tensor, "n": torch.full((9,), -1)}, tmp_path / WEIGHTS)
    header = read_header(tmp_path / WEIGHTS)
    with (tmp_path / WEIGHTS).open("rb") as file:
        assert first_unfinite(file, header) == (None if value is None else "a")
    assert struct.calcsize("d") == 8


def test_reading_takes_no_longer_for_a_large_name(tmp_path: Path) -> None:
    save_file({f"{'x' * 200}{i}": torch.zeros(1) for i in range(20_000)}, tmp_path / WEIGHTS)
    with bounded(seconds=5):
        assert len(read_header(tmp_path / WEIGHTS).entries) == 20_000
