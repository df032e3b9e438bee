# SPDX-License-Identifier: Apache-2.0
"""Rows into batches: padded, or packed so that a row holds several examples that do not see each other.

A packed row has no attention mask. Its position ids begin again at 0 with every example; transformers makes the mask of
blocks from that, for eager attention, SDPA and flash attention. `check_isolation` looks whether a model does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .tokens import IGNORED, Encoded

Feature = dict[str, list[Any]]
"""A row: token ids, and what else there is of it, each a list."""
Collate = Callable[[Sequence[Feature]], dict[str, Any]]
"""What puts rows into a batch."""


class Rows(torch.utils.data.Dataset):
    """A list of features as a data set."""

    def __init__(self, features: Iterable[Feature]) -> None:
        self.features = list(features)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Feature:
        return self.features[index]


def feature(row: Encoded) -> Feature:
    """One example as a row of its own."""
    return {"input_ids": row.input_ids, "labels": row.labels}


def pack(rows: Sequence[Encoded], length: int, window: int = 64) -> list[Feature]:
    """Rows of at most `length` tokens, each example whole in the first one, of the `window` open, that has room."""
    done: list[list[Encoded]] = []
    opened: list[list[Encoded]] = []
    for row in rows:
        fits = (b for b in opened if sum(len(r.input_ids) for r in b) + len(row.input_ids) <= length)
        room = next(fits, None)
        if room is not None:
            room.append(row)
            continue
        opened.append([row])
        if len(opened) > window:
            done.append(opened.pop(0))
    return [_joined(rows) for rows in done + opened]


def _joined(rows: Sequence[Encoded]) -> Feature:
    return {
        "input_ids": [t for r in rows for t in r.input_ids],
        # the first token of an example must not be learnt from the last of the one before
        "labels": [t for r in rows for t in [IGNORED, *r.labels[1:]]],
        "position_ids": [p for r in rows for p in range(len(r.input_ids))],
    }


class Collator:
    """Features to tensors `[batch, longest]`, filled up on the right; packed rows where they have `position_ids`.

    ends: have the model compute logits from the first answer on alone (`logits_to_keep`), and give it the labels of those
        positions. Where answers stand at the end of long rows, that saves most of the output layer's time and memory.
    """

    def __init__(self, pad: int, ends: bool = False) -> None:
        self.pad, self.ends = pad, ends

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        batch: dict[str, Any] = padded([f["input_ids"] for f in features], self.pad)
        longest = batch["input_ids"].shape[1]
        batch["labels"] = _filled([f["labels"] for f in features], longest, IGNORED)
        if "position_ids" in features[0]:  # the filling is one more block, which nobody looks at
            del batch["attention_mask"]
            rows = [f["position_ids"] for f in features]
            batch["position_ids"] = torch.tensor([r + list(range(longest - len(r))) for r in rows])
        return _from_first_answer(batch) if self.ends else batch


def _from_first_answer(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with labels, and logits, from the position that tells the first answer's first token."""
    taught = (batch["labels"] != IGNORED).any(0).nonzero()
    first = int(taught[0]) if len(taught) else 0
    kept = batch["labels"].shape[1] - max(first - 1, 0)
    return {**batch, "labels": batch["labels"][:, -kept:], "logits_to_keep": kept}


def takes_ends(model: nn.Module) -> bool:
    """Whether a causal language model can leave out the logits of a row's beginning."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def padded(rows: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Rows of token ids as `input_ids` `[rows, longest]`, filled up on the right, and their mask."""
    longest = max(map(len, rows))
    return {
        "input_ids": _filled(rows, longest, pad),
        "attention_mask": _filled([[1] * len(r) for r in rows], longest, 0),
    }


def _filled(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([r + [value] * (length - len(r)) for r in rows])


@torch.no_grad()
def check_isolation(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Raise `ConfigError` if, in the packed rows of `batch`, one example's tokens change the outputs of another."""
    ids, positions = batch["input_ids"], batch["position_ids"]
    # the rows' last blocks keep their tokens, all others get the next token of the vocabulary
    block = ((positions == 0).cumsum(1) == (positions == 0).sum(1, keepdim=True)) & (positions == 0).cumsum(1).gt(1)
    if not block.any():
        return
    other = torch.where(block, ids, (ids + 1) % int(ids.max() + 1))
    training = model.training
    model.eval()
    try:
        first, second = (_logits(model, x, positions)[block] for x in (ids, other))
    finally:
        model.train(training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            "training.packing: in this model's attention, packed examples see each other "
            f"(outputs move by {float((first - second).abs().max()):.2g}). Set training.packing = false."
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    return model(**inputs).logits.float()
