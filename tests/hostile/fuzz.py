# SPDX-License-Identifier: Apache-2.0
"""The long part: a million cases for each parser, and a soak of 100,000 operations. `make test-hostile` runs it.

    python -m tests.hostile.fuzz soak --cases 100000 --seed 1
    python -m tests.hostile.fuzz config --cases 1000000 --jobs 16
    python -m tests.hostile.fuzz header --engine atheris --cases 1000000

Each run adds how many cases it took, with which seed, to `benchmarks/results/hostile.json`. A case that breaks what must
hold ends the run, and is shown.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "hostile.json"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def header(content: bytes) -> None:
    """What our check accepts safetensors accepts, and they see the same tensors; anything else is one kind of error."""
    from safetensors import deserialize

    from graftlet.errors import AdapterFileError
    from graftlet.tensorfile import parse_header

    try:
        found = parse_header(content[:8], len(content), io.BytesIO(content[8:]).read, Path("fuzzed"))
    except AdapterFileError:
        return
    theirs = dict(deserialize(content))
    assert {k: list(e.shape) for k, e in found.entries.items()} == {k: v["shape"] for k, v in theirs.items()}


def config(text: bytes) -> None:
    """A config's text is a config, or an error that was raised on purpose."""
    from graftlet.config import PeftConfig, parsed
    from graftlet.errors import GraftletError

    try:
        made = PeftConfig.from_dict(parsed(text, Path("fuzzed")))
    except GraftletError:
        return
    assert type(made).from_dict(parsed(made.to_json().encode(), Path("again"))).to_json() == made.to_json()


def keys(names: bytes) -> None:
    """Keys of a file fill slots of the adapter, or are named as not belonging: no key reaches anything else."""
    import torch

    from graftlet.core import state
    from graftlet.errors import GraftletError
    from graftlet.model import embeddings

    model, wanted = _subject()
    given_ = {key: torch.empty(1, device="meta") for key in names.decode("utf-8", "replace").split("\n")}
    try:
        held = state.unpacked(model, "default", embeddings.without_levels(given_, wanted, "default"))
    except GraftletError:
        return
    report = state.fit({**wanted, **embeddings.slots(model, held)}, held)
    allowed = set(wanted) | set(embeddings.embedding_weights(model))
    assert set(held) - set(report.unexpected) <= allowed


_made: list[Any] = []


def _subject() -> Any:
    if not _made:
        from graftlet.core import state
        from tests.model.models import adapted, llama, lora

        model = adapted(llama(), lora())
        _made.append((model, state.slots(model, "default", model.peft_config["default"])))
    return _made[0]


def pattern(text: bytes) -> None:
    """A regex is matched as `re` would, or refused; in bounded time."""
    from graftlet.errors import ConfigError
    from graftlet.patterns import fullmatch

    regex, _, path = text.decode("utf-8", "replace").partition("\0")
    begun = time.perf_counter()
    with suppress(ConfigError):
        fullmatch(regex, path[:200])
    assert time.perf_counter() - begun < 30


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "config": config, "keys": keys, "pattern": pattern}


def _framed(body: bytes, data: bytes) -> bytes:
    return len(body).to_bytes(8, "little") + body + data


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "X", 3]),
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | JSON,
    }
)
BODIES = st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3).map(lambda d: json.dumps(d).encode())
HEADERS = st.builds(_framed, BODIES, st.binary(max_size=40))


def _fields() -> list[str]:
    import dataclasses

    from graftlet.registry import entries

    return sorted({f.name for e in entries() for f in dataclasses.fields(e.config)})


def _configs() -> st.SearchStrategy[bytes]:
    from graftlet.config import PeftType

    field = st.sampled_from(_fields()) | st.text(max_size=5)
    body = st.builds(
        lambda kind, rest: {**rest, "peft_type": kind},
        st.sampled_from(sorted(PeftType.__members__)) | JSON,
        st.dictionaries(field, JSON, max_size=4),
    )
    return body.map(lambda d: json.dumps(d).encode()) | st.binary(max_size=60)


def _keys() -> st.SearchStrategy[bytes]:
    known = list(_subject()[1])
    parts = st.sampled_from(
        [
            "base_model",
            "model",
            "lora_A",
            "default",
            "weight",
            "base_layer",
            "_orig_mod",
            "modules_to_save",
            "",
            "0",
            "q_proj",
        ]
    )
    key = st.sampled_from(known) | st.lists(parts | st.text(max_size=3), max_size=9).map(".".join)
    return st.lists(key, max_size=4).map(lambda k: "\n".join(k).encode("utf-8", "replace"))


PATTERNS = st.tuples(st.text("ab.()|*+?{}1,2[]^$\\dw=!<:", max_size=14), st.text("ab.", max_size=20)).map(
    lambda p: f"{p[0]}\0{p[1]}".encode()
)


def with_hypothesis(name: str, cases: int, number: int) -> None:
    strategies = {"header": HEADERS | st.binary(max_size=80), "pattern": PATTERNS}
    made = {"config": _configs, "keys": _keys}
    cases_of = strategies[name] if name in strategies else made[name]()

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases_of)
    def run(content: bytes) -> None:
        TARGETS[name](content)

    run()


def with_atheris(name: str, cases: int, number: int) -> None:
    """By coverage: the fuzzer sees which lines an input reaches. It ends the process, so what it did is told before."""
    import atheris

    with atheris.instrument_imports(
        include=["graftlet.tensorfile", "graftlet.config", "graftlet.patterns", "graftlet.files"]
    ):
        import graftlet.config
        import graftlet.files
        import graftlet.patterns
        import graftlet.tensorfile  # noqa: F401
    begun, done = time.perf_counter(), 0

    def one(content: bytes) -> None:
        nonlocal done
        TARGETS[name](_framed(*content.split(b"\0\0", 1)) if name == "header" and b"\0\0" in content[8:] else content)
        done += 1
        if done == cases:
            record(name, "atheris", cases, number, time.perf_counter() - begun)

    atheris.Setup([sys.argv[0], f"-runs={cases + 100}", f"-seed={number}", "-max_len=400", "-verbosity=0"], one)
    atheris.Fuzz()


def soak(cases: int, number: int) -> dict[str, Any]:
    """Operations at random on one model: memory stays flat, and the base's bits are there at the end."""
    from tests.hostile.subject import Subject

    subject, rng = Subject(number), random.Random(number)
    warm = min(cases // 5, 2000)
    for _ in range(warm):
        subject.step(rng)
    before = _memory()
    for _ in range(cases - warm):
        subject.step(rng)
    after = _memory()
    subject.unmerge()
    subject.check_bits()
    subject.close()
    assert after < before * 1.01 + 1, f"memory grew from {before:.1f} to {after:.1f} MiB"
    return {"memory_mib": [round(before, 1), round(after, 1)]}


def _memory() -> float:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def shared(target: str, cases: int, number: int, jobs: int) -> dict[str, Any]:
    """The cases by several processes at once, each with a seed of its own: from `number` on."""
    counts = [cases // jobs + (i < cases % jobs) for i in range(jobs)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        found = list(pool.map(alone, [target] * jobs, counts, range(number, number + jobs)))
    return {name: [one[name] for one in found] for name in found[0]} | ({"seeds": jobs} if jobs > 1 else {})


def alone(target: str, cases: int, number: int) -> dict[str, Any]:
    """The cases by one process."""
    warnings.simplefilter("ignore")
    if target == "soak":
        return soak(cases, number)
    with_hypothesis(target, cases, number)
    return {}


def record(target: str, engine: str, cases: int, number: int, seconds: float, **more: Any) -> None:
    """Add a run to the results, in the place of an earlier one of its kind."""
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    held[f"{target} by {engine}"] = {
        "cases": cases, "seed": number, "seconds": round(seconds, 1), "date": date.today().isoformat(), "broken": 0, **more,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n")
    print(f"{target} by {engine}: {cases:,} cases, seed {number}, {seconds:.0f} s, nothing broken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["soak", *TARGETS])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=["hypothesis", "atheris"], default="hypothesis")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases, each with the next seed")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.engine == "atheris":
        with_atheris(asked.target, asked.cases, asked.seed)
        return
    begun = time.perf_counter()
    more = shared(asked.target, asked.cases, asked.seed, asked.jobs)
    engine = "random" if asked.target == "soak" else asked.engine
    record(asked.target, engine, asked.cases, asked.seed, time.perf_counter() - begun, **more)


if __name__ == "__main__":
    main()
