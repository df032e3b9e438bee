# SPDX-License-Identifier: Apache-2.0
"""The house plan: imports go down only, without a circle, and `import graftlet` costs no more than it must."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "graftlet"
FLOORS = {
    "weights": 1, "core": 2, "methods": 3, "kernels": 3, "model": 4, "train": 4, "serve": 4,
    "integrations": 5, "knowledge": 5, "testing": 5, "cli": 5, "tuners": 5, "utils": 5,
}  # fmt: skip
"""The floor of each package; the modules beside them (`config`, `errors`, `registry`, `files`) are the ground, 0."""
SHARED_BY_METHODS = ("variants", "init", "data", "prompts", "parts", "allocation", "lora_config")
"""Packages inside `methods` that methods may import; they never import each other."""
UPSTAIRS = {("train", "model"), ("train", "serve"), ("serve", "model"), ("cli", "knowledge")}
"""On one floor, who may import whom."""

OPTIONAL = {
    "methods.adamss": {"sklearn"}, "methods.prompts.prompt_tuning": {"transformers"},
    "methods.parts.ready": {"transformers"}, "weights.bnb": {"bitsandbytes"},
    "weights.aqlm": {"numba"}, "weights.compressed": {"compressed_tensors"}, "weights.hqq": {"hqq"},
    "weights.torchao": {"torchao"}, "weights.quanto": {"optimum"}, "kernels.dropped_triton": {"triton"},
    "kernels.head_loss_triton": {"triton"}, "kernels.rows_triton": {"triton"},
    "kernels.gain_triton": {"triton"}, "kernels.gated_triton": {"triton"},
}  # fmt: skip
"""What a part needs beside torch for some of what it does, imported as that is used."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `graftlet`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, lazy: bool) -> Iterator[str]:
    """What a module imports as it is loaded; with `lazy`, also what its functions import as they run."""
    tree = ast.parse(MODULES[name].read_text())
    is_package = MODULES[name].name == "__init__.py"
    for node in reachable(tree, lazy):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from targets(node, name, is_package)


def reachable(node: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """The nodes that run (not those for type checkers alone)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from (n for other in child.orelse for n in [other, *reachable(other, lazy)])
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from reachable(child, lazy)


def targets(node: ast.ImportFrom, name: str, is_package: bool) -> Iterator[str]:
    """The modules that `from ... import ...` reads, ours as `graftlet.<name>`."""
    base = node.module or ""
    if node.level:
        here = ["graftlet", *name.split(".")] if name else ["graftlet"]
        kept = here[: len(here) - node.level + is_package]
        base = ".".join([*kept, base] if base else kept)
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if whole.removeprefix("graftlet.") in MODULES else base


def inner(name: str, lazy: bool = True) -> set[str]:
    """The modules of the package that a module imports."""
    found = {
        i.removeprefix("graftlet").removeprefix(".") for i in imported(name, lazy) if i.split(".")[0] == "graftlet"
    }
    return {f for f in found if f in MODULES and f != name}


def package(name: str) -> str:
    return name.split(".")[0] if name.split(".")[0] in FLOORS else ""


def floor(name: str) -> int:
    return FLOORS.get(package(name), 0)


def allowed(source: str, target: str) -> bool:
    if floor(target) != floor(source):
        return floor(target) < floor(source)
    if package(source) == package(target):
        return True
    return (package(source), package(target)) in UPSTAIRS


def methods_apart(source: str, target: str) -> bool:
    """Two modules of `methods` that must not know each other: each is a method, and the target is no shared part."""
    parts = target.split(".")
    if package(source) != "methods" or package(target) != "methods" or target == "methods":
        return False
    return parts[1] not in SHARED_BY_METHODS


@pytest.mark.parametrize("name", [m for m in MODULES if m])
def test_imports_go_down(name: str) -> None:
    assert name.split(".")[0] in FLOORS or "." not in name, f"{name}: give its package a floor"
    up = sorted(t for t in inner(name) - {""} if not allowed(name, t))
    assert not up, f"{name} (floor {floor(name)}) imports {up}"


def test_methods_do_not_import_each_other() -> None:
    pairs = [(s, t) for s in MODULES for t in inner(s) if methods_apart(s, t)]
    assert not pairs


def test_no_circle() -> None:
    """Neither at load nor in functions: an import inside a function may save time, not cut a circle."""
    graph = {m: inner(m) - {""} for m in MODULES if m}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("name", [m for m in MODULES if floor(m) <= 3 and m])
def test_the_lower_floors_know_torch_alone(name: str) -> None:
    top = {i.split(".")[0] for i in imported(name, lazy=True)}
    foreign = top - set(sys.stdlib_module_names) - {"graftlet", "torch"}
    files = {"safetensors", "huggingface_hub"} if floor(name) == 0 else set()
    assert not foreign - files - OPTIONAL.get(name, set()) - {"tqdm"}, foreign  # tqdm comes with huggingface_hub


def in_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_graftlet_imports_next_to_nothing() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'peft', 'numpy', 'huggingface_hub') if m in sys.modules]"
    assert in_fresh_interpreter(f"import sys, graftlet; print({heavy})") == "[]"


def test_the_core_and_all_methods_work_without_transformers() -> None:
    code = "import sys, graftlet.core.tuner, graftlet.registry as r; list(r.entries()); print('transformers' in sys.modules)"
    assert in_fresh_interpreter(code) == "False"


def test_every_public_name_resolves() -> None:
    import graftlet

    assert not [name for name in graftlet.__all__ if not hasattr(graftlet, name)]
