# SPDX-License-Identifier: Apache-2.0
"""A model that adapters come to and go from, beside a simple model of what must hold.

The simple model is a table: each adapter's change of each weight, which adapters are active and which are merged. Every
operation is done to both, and outputs, names and the base's bits must agree.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graftlet
from graftlet.core.host import hosts
from graftlet.errors import AdapterNameError, MergeError
from graftlet.serve.hotswap import hotswap_adapter
from tests.model.models import Net, silent

NAMES = ("a", "b", "c", "weight", "ü")
LAYERS = ("a", "b")
SAVED = 3
"""How many adapters there are to load."""
RANK = 2


def config() -> Any:
    return graftlet.LoraConfig(r=RANK, lora_alpha=3, target_modules=list(LAYERS), init_lora_weights=False)


class Subject:
    """Operations on a model with adapters, each checked."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.folder = tempfile.TemporaryDirectory()
        self.base = Net().requires_grad_(False)
        self.bits = {n: p.clone() for n, p in self.base.named_parameters()}
        self.x = torch.randn(3, 4)
        self.stored: list[dict[str, Tensor]] = []
        for i in range(SAVED):
            with silent():
                model = graftlet.get_peft_model(Net(), config())
            model.save_pretrained(Path(self.folder.name, str(i)))
            self.stored.append(changes(model, "default"))
        with silent():
            self.model = graftlet.get_peft_model(self.base, config(), "a").eval()
        self.table: dict[str, dict[str, Tensor]] = {"a": changes(self.model, "a")}
        self.active: list[str] = ["a"]
        self.merged: list[str] = []
        self.done = 0

    # operations: each is refused where it must be

    def add(self, name: str) -> None:
        if self._refused(name in self.table, AdapterNameError, lambda: self.model.add_adapter(name, config())):
            return
        self.table[name] = changes(self.model, name)
        self._came(name)

    def load(self, name: str, which: int) -> None:
        folder = Path(self.folder.name, str(which))
        if self._refused(name in self.table, AdapterNameError, lambda: self.model.load_adapter(folder, name)):
            return
        self.table[name] = self.stored[which]
        self._came(name)

    def _came(self, name: str) -> None:
        self.active = self.active or [name]

    def set(self, names: list[str]) -> None:
        unknown = any(n not in self.table for n in names)
        if self._refused(unknown, AdapterNameError, lambda: self.model.set_adapter(names)):
            return
        if self.merged and names != self.active:
            self.merged = []
        self.active = list(names)

    def merge(self, names: list[str]) -> None:
        unknown = any(n not in self.table for n in names)
        if self._refused(unknown, AdapterNameError, lambda: self.model.merge_adapter(names)):
            return
        self.merged += [n for n in dict.fromkeys(names) if n not in self.merged]

    def unmerge(self) -> None:
        with silent():
            self.model.unmerge_adapter()
        self.merged = []

    def delete(self, name: str) -> None:
        error = AdapterNameError if name not in self.table else MergeError
        wrong = name not in self.table or name in self.merged
        if self._refused(wrong, error, lambda: self.model.delete_adapter(name)):
            return
        del self.table[name]
        if name in self.active:
            self.active = [n for n in self.active if n != name] or list(self.table)[:1]
            if self.merged:
                self.merged = []

    def rename(self, old: str, new: str) -> None:
        wrong = old not in self.table or (new in self.table and new != old)
        if self._refused(wrong, AdapterNameError, lambda: self.model.rename_adapter(old, new)):
            return
        self.table = {new if n == old else n: change for n, change in self.table.items()}
        self.active = [new if n == old else n for n in self.active]
        self.merged = [new if n == old else n for n in self.merged]

    def swap(self, name: str, which: int) -> None:
        folder = str(Path(self.folder.name, str(which)))
        error = AdapterNameError if name not in self.table else MergeError
        wrong = name not in self.table or name in self.merged
        if self._refused(wrong, error, lambda: hotswap_adapter(self.model, folder, name)):
            return
        self.table[name] = self.stored[which]

    def _refused(self, wrong: bool, error: type[Exception], act: Any) -> bool:
        """Do it; where it must fail, it does, and nothing has changed (which `check` sees)."""
        with silent():
            if not wrong:
                act()
                return False
            try:
                act()
            except error:
                return True
        raise AssertionError("it should have been refused")

    # what must hold

    def check(self) -> None:
        assert sorted(self.model.peft_config) == sorted(self.table)
        acting = [*self.merged, *(n for n in self.active if n not in self.merged)]
        assert torch.allclose(self.output(), self.wanted(acting), atol=1e-5), (self.active, self.merged)
        if not self.merged:
            self.check_bits()
        assert [n for _, h in hosts(self.model) for n in h.merged_adapters] == [*self.merged] * len(LAYERS)

    def check_bits(self) -> None:
        held = {n.replace(".base_layer", ""): p for n, p in self.base.named_parameters() if "lora_" not in n}
        assert held.keys() == self.bits.keys()
        assert all(torch.equal(p, self.bits[n]) for n, p in held.items())

    @torch.no_grad()
    def output(self) -> Tensor:
        return self.model(self.x)

    @torch.no_grad()
    def wanted(self, acting: list[str]) -> Tensor:
        x = self.x
        for layer in LAYERS:
            W = self.bits[f"{layer}.weight"] + sum((self.table[n][layer] for n in acting), torch.zeros(4, 4))
            x = torch.tanh(x @ W.T + self.bits[f"{layer}.bias"])
        return x @ self.bits["head.weight"].T + self.bits["head.bias"]

    def step(self, rng: random.Random) -> None:
        """One operation at random, and what must hold after it."""
        name, other = rng.choice(NAMES), rng.choice(NAMES)
        names = [name] if rng.random() < 0.6 else list(dict.fromkeys([name, other]))
        act = rng.randrange(9)
        if act == 0:
            self.add(name)
        elif act in (1, 2):
            self.load(name, rng.randrange(SAVED))
        elif act == 3:
            self.set(names)
        elif act == 4:
            self.merge(names)
        elif act == 5:
            self.unmerge()
        elif act == 6 and len(self.table) > 1:
            self.delete(name)
        elif act == 7:
            self.rename(name, other)
        elif act == 8:
            self.swap(name, rng.randrange(SAVED))
        self.done += 1
        self.check()

    def close(self) -> None:
        self.folder.cleanup()


@torch.no_grad()
def changes(model: Any, name: str) -> dict[str, Tensor]:
    """An adapter's change of each weight, by its factors."""
    found = {}
    for layer in LAYERS:
        held = getattr(model.get_base_model(), layer)
        A, B = held.lora_A[name].weight, held.lora_B[name].weight
        found[layer] = (B @ A * held.scaling[name]).clone()
    return found
