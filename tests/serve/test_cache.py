# SPDX-License-Identifier: Apache-2.0
"""Many adapters from disk, in bounded memory and a few places of a model."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlet
from graftlet import AdapterCache, AdapterPool
from graftlet.errors import AdapterFileError, CallError
from graftlet.testing.benches import perturb
from tests.model.models import IDS, llama, lora, save

COUNT = 12


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A dozen adapters of different ranks, and what each gives."""
    folder, expected = tmp_path_factory.mktemp("library"), {}
    for i in range(COUNT):
        model = graftlet.get_peft_model(llama(), lora(r=1 + i % 4, lora_alpha=3 + i)).eval()
        perturb(model, seed=i)
        save(model, folder / f"a{i}")
        with torch.no_grad():
            expected[f"a{i}"] = model(input_ids=IDS[:1]).logits[0]
    return folder, expected


def size(folder: Path, name: str) -> int:
    return sum(t.nbytes for t in graftlet.load_peft_weights(folder / name).values())


def test_memory_is_bounded_and_the_oldest_goes_first(library: Any) -> None:
    folder, _ = library
    cache = AdapterCache(size(folder, "a0") + size(folder, "a1") + size(folder, "a2"), folder)
    for name in ("a0", "a1", "a0", "a2"):
        cache.get(name)
    assert cache.nbytes <= cache.capacity
    assert (cache.hits, cache.misses) == (1, 3)
    cache.get("a3")
    assert cache.nbytes <= cache.capacity
    assert "a3" in cache
    assert "a1" not in cache
    small = AdapterCache(8, folder)
    assert small.get("a3").nbytes > 8  # it is given, but not kept
    assert len(small) == 0


def test_files_are_read_in_the_background_and_once(library: Any) -> None:
    folder, _ = library
    reads: list[str] = []

    def find(name: str) -> Path:
        reads.append(name)
        time.sleep(0.02)
        return folder / name

    cache = AdapterCache(1 << 20, find)
    cache.prefetch(["a0", "a1"])
    threads = [threading.Thread(target=cache.get, args=("a0",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.get("a1")
    assert sorted(reads) == ["a0", "a1"]
    cache.drop("a1")
    cache.get("a1")
    assert sorted(reads) == ["a0", "a1", "a1"]
    cache.close()


def test_a_missing_or_broken_file_is_told_to_whoever_asks(library: Any, tmp_path: Path) -> None:
    cache = AdapterCache(1 << 20, tmp_path)
    cache.prefetch(["nobody"])
    with pytest.raises(AdapterFileError, match="nobody"):
        cache.get("nobody")
    with pytest.raises(CallError, match="capacity"):
        AdapterCache(0)


def test_every_adapter_serves_from_three_places(library: Any) -> None:
    folder, expected = library
    model: Any = graftlet.get_peft_model(llama(), lora(r=2))
    pool = AdapterPool(model, AdapterCache(4000, folder), places=3)
    for i in range(2 * COUNT):
        names = [f"a{(5 * i + k) % COUNT}" for k in (0, 1, 0, 3)]
        with pool.rows(names) as rows, torch.no_grad():
            y = model(input_ids=IDS[:1].repeat(4, 1), adapter_names=rows).logits
        torch.testing.assert_close(y, torch.stack([expected[n] for n in names]))
        assert pool.cache.nbytes <= 4000
    with pytest.raises(CallError, match="4 adapters"), pool.rows(["a0", "a1", "a2", "a3"]):
        pass


def test_a_bad_adapter_leaves_the_places_as_they_were(library: Any, tmp_path: Path) -> None:
    folder, expected = library
    other = graftlet.get_peft_model(llama(), lora(target_modules=["k_proj"]))
    save(other, tmp_path / "bad")
    model: Any = graftlet.get_peft_model(llama(), lora(r=2))
    pool = AdapterPool(model, AdapterCache(1 << 20, lambda n: tmp_path / n if n == "bad" else folder / n), places=1)
    with pool.rows(["a1"]):
        pass
    with pytest.raises(AdapterFileError), pool.rows(["bad"]):
        pass
    assert list(pool.standing) == ["a1"]
    with pool.rows(["a1"]) as rows, torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS[:1], adapter_names=rows).logits[0], expected["a1"])


def test_threads_share_the_places(library: Any) -> None:
    folder, expected = library
    model: Any = graftlet.get_peft_model(llama(), lora(r=2))
    pool = AdapterPool(model, AdapterCache(1 << 20, folder), places=2)
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for i in range(COUNT):
                name = f"a{(start + i) % COUNT}"
                with pool.rows([name]) as rows, torch.no_grad():
                    y = model(input_ids=IDS[:1], adapter_names=rows).logits[0]
                torch.testing.assert_close(y, expected[name])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_the_example_serves_more_than_there_are_places() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "examples/serve_many.py", "20"], capture_output=True, text=True, check=True, timeout=300
    )
    assert "400 requests for" in done.stdout
