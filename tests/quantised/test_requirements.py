# SPDX-License-Identifier: Apache-2.0
"""What is missing, too old or half there breaks nobody who does not use it, and says what to do to those who do."""

from __future__ import annotations

import copy
import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from graftlet.errors import DependencyError
from graftlet.requirements import REQUIREMENTS, Requirement
from graftlet.weights import storage

from . import backends
from .backends import BACKENDS, Backend
from .conftest import pytest_collection_modifyitems
from .formats import Format


def test_versions_are_compared_as_numbers() -> None:
    assert Requirement("tests", "pytest", ">=3,<100").met
    assert not Requirement("tests", "pytest", ">=100").met
    assert not Requirement("tests", "pytest", ">=3,<4").met
    assert not Requirement("tests", "no-such-package-here", ">=0").met


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_package_that_is_too_old_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = REQUIREMENTS[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.0.1.dev0+cpu")
    with pytest.raises(DependencyError) as caught:
        needed.check()
    said = str(caught.value)
    for part in (needed.feature, needed.package, "0.0.1.dev0+cpu", needed.versions, f'pip install "{needed.package}'):
        assert part in said


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    needed = REQUIREMENTS[name]
    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(DependencyError) as caught:
        needed.check()
    said = f"{needed.feature} needs {needed.package} {needed.versions}, which is not installed. {needed.command}"
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["back end", "builds", "format"])
def test_what_is_missing_is_skipped_with_its_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "back end": Backend("x", "no_such_package.here", copy.copy, 0, 0),
        "builds": Backend("x", "torch", copy.copy, 0, 0, builds=True),
        "format": Format("x", ("torch", "no_such_package"), copy.copy, 0, 0),
    }[kind]
    monkeypatch.setattr(backends, "compiles", lambda: False)
    marks: list[Any] = []
    item = SimpleNamespace(callspec=SimpleNamespace(params={"form": given, "x": 1}), add_marker=marks.append)
    plain = SimpleNamespace(add_marker=marks.append)
    pytest_collection_modifyitems([item, plain])
    said = {"builds": "no compiler and ninja, with which quanto builds its kernels"}
    names = {"back end": "no_such_package.here", "format": "no_such_package"}
    expected = said.get(kind) or f"{names[kind]} is not installed"
    assert [m.mark.kwargs["reason"] for m in marks] == [expected]
    assert not any(b.missing for b in BACKENDS if b.needs == "torch")


def test_a_back_end_that_is_too_old_is_refused_as_its_layer_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64)
    storage._load.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.40.0")
    with pytest.raises(DependencyError, match="needs bitsandbytes .* is installed as 0.40.0"):
        storage.storage_of(layer)
    assert storage.storage_of(nn.Linear(2, 2)) is storage.PLAIN
    monkeypatch.undo()
    assert storage.storage_of(layer).backend


BROKEN = """
import sys, types
class Half(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"{self.__name__} is half installed")
for name in ("bitsandbytes", "torchao", "optimum", "optimum.quanto", "hqq", "gptqmodel", "awq", "aqlm", "eetq"):
    sys.modules[name] = Half(name)
import torch, graftlet
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(3, 4))
adapted = graftlet.get_peft_model(model, graftlet.LoraConfig(target_modules=["0"], r=2))
adapted.base_model.model[0](torch.randn(2, 8)).sum().backward()
adapted.merge_adapter()
adapted.unmerge_adapter()
adapted.merge_and_unload()
print("well")
"""


def test_half_installed_back_ends_break_nobody_else() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "well", done.stderr


def test_no_back_end_is_imported_for_plain_layers() -> None:
    code = (
        "import sys, torch, graftlet\n"
        "m = graftlet.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), graftlet.LoraConfig(target_modules=['0']))\n"
        "m.merge_and_unload()\n"
        "print([n for n in ('bitsandbytes', 'torchao', 'optimum') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
