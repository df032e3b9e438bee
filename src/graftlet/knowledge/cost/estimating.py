# SPDX-License-Identifier: Apache-2.0
"""`estimate`: what a training step will take, from the configs alone.

Nothing is loaded. The model is made without data and a step of it is really taken, adapters, checkpointing, kernels and
optimiser included: every storage is weighed as it comes and goes, and every operation is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...config import PeftConfig
from ...errors import PeftError
from .devices import SCRATCH, Device, find_device
from .levers import Change, changes_of
from .roofline import Time, roofline
from .setup import Dtype, Setup, as_dtype, checked, model_config
from .skeleton import build, counts
from .step import rehearse
from .traffic import Traffic, sent

PARTS = ("weights", "adapters", "gradients", "optimiser", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most is held, by part.

    activations: what is kept for backward. logits: those of all tokens, and their gradients. workspace: what is there for a
    moment. phase: when that moment is.
    """

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    workspace: int
    phase: str

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class Lever:
    """One thing to do otherwise, and what the step then takes."""

    name: str
    said: str
    costs: str
    peak: int
    saved: int
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """What a training step takes.

    trainable, parameters: numbers that learn, and all there are. memory: at the peak, by part. time: of a step (all of its
    accumulated batches). device: for which one.
    """

    setup: Setup
    trainable: int
    parameters: int
    memory: Memory
    time: Time
    gradient_bytes: int

    @property
    def device(self) -> Device:
        """The device that it is for."""
        return self.setup.device

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.peak <= self.device.room

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.setup.batch * self.setup.sequence * self.setup.accumulation

    @functools.cached_property
    def levers(self) -> tuple[Lever, ...]:
        """What would make it smaller, each alone, with what it then takes. Each is worked out as this was."""
        return tuple(lever for change in changes_of(self.setup) if (lever := self._tried(change)) is not None)

    def _tried(self, change: Change) -> Lever | None:
        try:
            other = estimated(self.setup.but(**change.changes))
        except PeftError:
            return None  # this model cannot do it
        return Lever(
            change.name, change.said, change.costs, other.peak, self.peak - other.peak, other.time.likely, other.fits
        )

    def fitting(self) -> tuple[Lever, ...]:
        """The fewest levers, those first that cost least, that together make it fit; none where it fits or nothing does."""
        taken, setup = list[Lever](), self.setup
        if self.fits:
            return ()
        for change, other in _pulled(setup):
            taken.append(
                Lever(
                    change.name,
                    change.said,
                    change.costs,
                    other.peak,
                    self.peak - other.peak,
                    other.time.likely,
                    other.fits,
                )
            )
            if other.fits:
                return tuple(taken)
        return ()

    def traffic(self, workers: int) -> Traffic:
        """What each of some data-parallel workers sends a step."""
        return sent(self.gradient_bytes, self.parameters, self.setup.dtype.itemsize, workers)

    def to_dict(self) -> dict[str, Any]:
        """All of it, levers included, as plain values."""
        return {
            "method": None if self.setup.adapter is None else str(self.setup.adapter.peft_type),
            "device": asdict(self.device),
            "batch": self.setup.batch,
            "sequence": self.setup.sequence,
            "accumulation": self.setup.accumulation,
            "trainable": self.trainable,
            "parameters": self.parameters,
            "memory": {**{part: getattr(self.memory, part) for part in PARTS}, "peak": self.peak},
            "when": self.memory.phase,
            "room": self.device.room,
            "fits": self.fits,
            "seconds": asdict(self.time),
            "levers": [asdict(lever) for lever in self.levers],
            "sent": {str(n): asdict(self.traffic(n)) for n in (2, 8)},
        }


def estimate(
    model_config: Any,
    adapter_config: PeftConfig | None = None,
    *,
    batch: int = 1,
    sequence: int = 1024,
    accumulation: int = 1,
    optimiser: str = "adamw",
    optimiser_options: dict[str, Any] | None = None,
    dtype: Dtype | None = None,
    adapter_dtype: Dtype | None = None,
    checkpointing: bool = False,
    quantisation: str | None = None,
    double: bool = True,
    skip: tuple[str, ...] = (),
    prepared: bool = True,
    optimised: bool = False,
    padding: bool = False,
    attention: str | None = None,
    device: str | torch.device | Device | None = None,
) -> Estimate:
    """What training an adapter takes: parameters, memory at the peak by part, time a step, what would make it smaller.

    Args:
        model_config: a config of transformers, a dictionary with `model_type`, a folder, a GGUF file, or an id of the hub.
        adapter_config: any method's config; None for full fine-tuning.
        batch, sequence: rows and tokens of a call. accumulation: calls a step.
        optimiser: adamw, adamw_fused, adamw_8bit, sgd, adafactor, or one made for LoRA: loraplus, lorafa, riemannian.
        dtype: of the base; bfloat16 unless given (float32 on the CPU). adapter_dtype: of the adapter; float32 unless given.
        checkpointing: blocks are run again in backward. attention: the
            implementation that transformers is asked for.
        quantisation: nf4, fp4 or int8. double: scales are quantised too. skip: layers that are not. prepared: with
            `prepare_model_for_kbit_training`, which keeps norms, embeddings and the head in float32.
        optimised: with `optimize_model`, on CUDA or a CPU. padding: rows differ in length, so that there is an attention mask.
        device: a name of the table ("H100", "RTX 4090"), "cuda" or "cpu" for this machine's; the best here unless given.

    Raises:
        ConfigError: something that cannot be estimated, or does not exist; the message says which. What an adapter's config
            is refused for is raised as by `get_peft_model`.
    """
    found = find_device(device)
    usual = torch.float32 if found.kind == "cpu" else torch.bfloat16
    setup = Setup(
        config=_config(model_config),
        adapter=adapter_config,
        device=found,
        batch=batch,
        sequence=sequence,
        accumulation=accumulation,
        optimiser=optimiser,
        optimiser_options=optimiser_options or {},
        dtype=as_dtype(dtype, "dtype") or usual,
        adapter_dtype=as_dtype(adapter_dtype, "adapter_dtype"),
        checkpointing=checkpointing,
        quantisation=quantisation,
        double=double,
        skip=tuple(skip),
        prepared=prepared,
        optimised=optimised,
        padding=padding,
        attention=attention,
    )
    return estimated(setup)


_config = model_config


def estimated(setup: Setup) -> Estimate:
    """The estimate of a setup."""
    setup = checked(setup)
    model, base = build(setup.but(adapter={}) if setup.adapter is not None else setup)
    trainable, parameters = counts(model)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    book = rehearse(model, base, setup)
    peak = book.peak()
    parts = {part: peak.parts[part] for part in PARTS}
    parts["workspace"] += SCRATCH.get(setup.device.kind, 0)
    calls = min(setup.accumulation, 2)
    time = roofline(book.work, setup.device, setup.accumulation / calls)
    return Estimate(setup, trainable, parameters, Memory(**parts, phase=peak.phase), time, gradients)


def _pulled(setup: Setup) -> Iterator[tuple[Change, Estimate]]:
    """Lever after lever pulled, each beside those before; halved again and again where that is what it does."""
    done = set[str]()
    while (change := next((c for c in changes_of(setup) if _useful(c, done)), None)) is not None:
        try:
            other = estimated(setup.but(**change.changes))
        except PeftError:
            done.add(change.name)
            continue
        if change.name not in REPEATED:
            done.add(change.name)
        setup = other.setup
        yield change, other


REPEATED = ("batch", "sequence")
"""Levers that can be pulled again."""


def _useful(change: Change, done: set[str]) -> bool:
    return change.name not in done
