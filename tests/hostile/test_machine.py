# SPDX-License-Identifier: Apache-2.0
"""Any order of operations: a state machine against a simple model of what must hold."""

from __future__ import annotations

import gc
import random

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.hostile.subject import NAMES, SAVED, Subject

NAME = st.sampled_from(NAMES)
SOME = st.lists(NAME, min_size=1, max_size=2, unique=True)
WHICH = st.integers(0, SAVED - 1)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.subject = Subject()

    @rule(name=NAME)
    def add(self, name: str) -> None:
        self.subject.add(name)

    @rule(name=NAME, which=WHICH)
    def load(self, name: str, which: int) -> None:
        self.subject.load(name, which)

    @rule(names=SOME)
    def set(self, names: list[str]) -> None:
        self.subject.set(names)

    @rule(names=SOME)
    def merge(self, names: list[str]) -> None:
        self.subject.merge(names)

    @rule()
    def unmerge(self) -> None:
        self.subject.unmerge()

    @precondition(lambda self: len(self.subject.table) > 1)
    @rule(name=NAME)
    def delete(self, name: str) -> None:
        self.subject.delete(name)

    @rule(old=NAME, new=NAME)
    def rename(self, old: str, new: str) -> None:
        self.subject.rename(old, new)

    @rule(name=NAME, which=WHICH)
    def swap(self, name: str, which: int) -> None:
        self.subject.swap(name, which)

    @invariant()
    def holds(self) -> None:
        self.subject.check()

    def teardown(self) -> None:
        self.subject.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_short_soak_leaves_the_base_and_no_tensors_behind() -> None:
    subject, rng = Subject(), random.Random(1)
    for _ in range(150):
        subject.step(rng)
    before = tensors()
    for _ in range(300):
        subject.step(rng)
    subject.unmerge()
    subject.check_bits()
    assert tensors() <= before + 5 * 2 * 4 * 3  # as many as there are adapters more now, at most
    subject.close()


def tensors() -> int:
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
