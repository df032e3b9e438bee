# SPDX-License-Identifier: Apache-2.0
"""Making adapters that a stranger might send, and measuring what reading them takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import graftlet
from tests.model.models import adapted, facts, llama, lora, same, save, silent

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SECONDS, MEBIBYTES = 20.0, 200.0
"""What refusing any file may take on a slow machine; most take milliseconds, and an attack takes for ever."""


def saved(folder: Path, **values: Any) -> Path:
    """A good adapter of `llama()`."""
    save(adapted(llama(), lora(init_lora_weights=False, **values)), folder)
    return folder


def configured(folder: Path, **fields: Any) -> Path:
    """The adapter with other fields in its config, whether such fields can be or not."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    """The adapter with other tensors; `change` edits them in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, true or not; text as it stands, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@contextmanager
def bounded(seconds: float = SECONDS, mebibytes: float = MEBIBYTES) -> Iterator[None]:
    """What happens inside takes bounded time, of the processor whatever else it does, and memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest use of memory starts anew
    before, begun = _memory("VmRSS"), time.process_time()
    yield
    took, grown = time.process_time() - begun, _memory("VmHWM") - before
    assert took < seconds, f"{took:.1f} s"
    assert grown < mebibytes, f"{grown:.0f} MiB"


def _memory(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def refused(folder: Path, match: str = "", error: type[Exception] = graftlet.GraftletError, **options: Any) -> str:
    """Loading an adapter fails with a clear error, in bounded time and memory, and leaves bare and adapted models alone."""
    base = llama()
    model = adapted(llama(), lora(target_modules=["v_proj"]))
    for subject, load in (
        (base, lambda: graftlet.PeftModel.from_pretrained(base, folder, **options)),
        (model, lambda: model.load_adapter(folder, "other", **options)),
    ):
        before = facts(subject)
        with bounded(), silent(), pytest.raises(error, match=match) as raised:
            load()
        assert same(before, subject)
    assert list(model.peft_config) == ["default"]
    return str(raised.value)
